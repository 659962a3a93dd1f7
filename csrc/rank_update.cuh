// W' = W + U diag(c) D for a group of layers in one launch; what c is, the kind of layer says. Here
// by plain arithmetic, for float32 and GPUs without tensor cores. Included by .cu files only.
#pragma once

#include "layer_group.cuh"
#include "ptx.cuh"
#include "rank_update_sm80.cuh"

namespace fastlora {

// A thread computes kTileThreadRows x kWidth elements of its block's tile.
constexpr int kTileThreadRows = 8;
constexpr int kTileThreads = kTileRows / kTileThreadRows * (kTileColumns / kWidth);
constexpr int kTileRank = 16;  // components that are in shared memory at a time

// Components with a zero coefficient are zeros, whatever U and D hold.
template <class T, class Layer>
__device__ __forceinline__ void load_down(const Layer& p, float c, int64_t k, int32_t column,
                                          float* to) {
  const int64_t at = k * p.down_stride[0] + column * p.down_stride[1];
  const int count = k < p.rank && c != 0.0f ? elements_left(column, p.in) : 0;
  if (p.down_wide)
    load_strided(static_cast<const float*>(p.down) + at, p.down_stride[1], count, to);
  else
    load_strided(static_cast<const T*>(p.down) + at, p.down_stride[1], count, to);
}

template <class T, class Layer>
__device__ __forceinline__ float load_factor(const Layer& p, int64_t row, int64_t k) {
  const float c = row < p.out && k < p.rank ? coefficient(p, k) : 0.0f;
  if (c == 0.0f) return 0.0f;
  const int64_t at = row * p.up_stride[0] + k * p.up_stride[1];
  return c *
         (p.up_wide ? static_cast<const float*>(p.up)[at] : widen(static_cast<const T*>(p.up)[at]));
}

template <class T, class Group>
__global__ void __launch_bounds__(kTileThreads, 3)
    rank_update_kernel(const __grid_constant__ Group group) {
  FASTLORA_SHARED(down, float[kTileRank][kTileColumns]);
  FASTLORA_SHARED(factor, float[kTileRank][kTileRows + 4]);

  const Tile tile = tile_of<UpdateTiles>(group, int32_t(blockIdx.x));
  const auto& p = group.layers[tile.layer];
  constexpr int kGroups = kTileColumns / kWidth;  // of columns, across the tile
  const int thread = int(threadIdx.x);
  const int my_row = thread / kGroups * kTileThreadRows, my_column = thread % kGroups * kWidth;
  float sum[kTileThreadRows][kWidth] = {};

  // W will be read after the arithmetic: by then it is half way here.
  const auto* weight = static_cast<const T*>(p.weight);
  constexpr int kLine = 128 / int(sizeof(T));
  for (int e = thread; e < kTileRows * kTileColumns / kLine; e += kTileThreads) {
    const int32_t row = tile.row + e / (kTileColumns / kLine);
    const int32_t column = tile.column + e % (kTileColumns / kLine) * kLine;
    if (row < p.out && column < p.in)
      prefetch(weight + int64_t(row) * p.weight_stride[0] + int64_t(column) * p.weight_stride[1]);
  }

  for (int32_t k0 = 0; k0 < p.rank; k0 += kTileRank) {
    __syncthreads();  // the last components are no longer read
    for (int g = thread; g < kTileRank * kGroups; g += kTileThreads) {
      const int64_t k = k0 + g / kGroups;
      float* to = &down[g / kGroups][g % kGroups * kWidth];
      load_down<T>(p, k < p.rank ? coefficient(p, k) : 0.0f, k, tile.column + g % kGroups * kWidth,
                   to);
    }
    for (int e = thread; e < kTileRank * kTileRows; e += kTileThreads)
      factor[e % kTileRank][e / kTileRank] =
          load_factor<T>(p, tile.row + e / kTileRank, k0 + e % kTileRank);
    __syncthreads();
    // Sums of a chunk by themselves, so that roundings do not add up over a large rank; half of the
    // rows at a time, as many as there are registers for.
    constexpr int kHalf = kTileThreadRows / 2;
#pragma unroll
    for (int first = 0; first < kTileThreadRows; first += kHalf) {
      float part[kHalf][kWidth] = {};
#pragma unroll 2  // more would be loaded ahead than there are registers for
      for (int k = 0; k < kTileRank; ++k) {
        float d[kWidth], f[kHalf];
#pragma unroll
        for (int j = 0; j < kWidth; j += 4)
          *reinterpret_cast<float4*>(d + j) =
              *reinterpret_cast<const float4*>(&down[k][my_column + j]);
#pragma unroll
        for (int m = 0; m < kHalf; m += 4)
          *reinterpret_cast<float4*>(f + m) =
              *reinterpret_cast<const float4*>(&factor[k][my_row + first + m]);
#pragma unroll
        for (int m = 0; m < kHalf; ++m)
#pragma unroll
          for (int j = 0; j < kWidth; ++j) part[m][j] += f[m] * d[j];
      }
#pragma unroll
      for (int m = 0; m < kHalf; ++m)
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum[first + m][j] += part[m][j];
    }
  }

  const int32_t column = tile.column + my_column;
  if (column >= p.in) return;
  const int count = elements_left(column, p.in);
#pragma unroll
  for (int m = 0; m < kTileThreadRows; ++m) {
    const int32_t row = tile.row + my_row + m;
    if (row >= p.out) return;
    float w[kWidth];
    load_strided(weight + int64_t(row) * p.weight_stride[0] + int64_t(column) * p.weight_stride[1],
                 p.weight_stride[1], count, w);
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      if (sum[m][j] != 0.0f) w[j] += sum[m][j];  // without a sum even -0 keeps its sign
    store_strided(static_cast<T*>(p.result) + int64_t(row) * p.result_stride[0] +
                      int64_t(column) * p.result_stride[1],
                  p.result_stride[1], count, w);
  }
}

// Layers of one dtype: one launch for as many as its parameters hold.
template <class T, class Layer>
void launch_rank_update(const std::vector<Layer>& layers, void* stream) {
  for_each_group<UpdateTiles>(layers, [&](const auto& group, dim3 tiles) {
    using Group = std::decay_t<decltype(group)>;
    if constexpr (sizeof(T) == 2) {
      const auto kernel = rank_update_sm80_kernel<T, Group>;
      if (has_tensor_cores(kernel))
        return launch("rank_update_sm80", kernel, tiles, dim3(kTensorThreads), 0, stream, group);
    }
    launch("rank_update", rank_update_kernel<T, Group>, tiles, dim3(kTileThreads), 0, stream,
           group);
  });
}

template <class Layer>
void launch_rank_update(const std::vector<Layer>& layers, DType dtype, void* stream) {
  switch (dtype) {
    case DType::kFloat16: return launch_rank_update<__half>(layers, stream);
    case DType::kBFloat16: return launch_rank_update<__nv_bfloat16>(layers, stream);
    default: return launch_rank_update<float>(layers, stream);
  }
}

}  // namespace fastlora
