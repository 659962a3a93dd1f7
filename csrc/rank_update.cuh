// W' = W + U diag(c) D for some dozens of layers in one launch; what c is, the kind of layer says.
// Included by the .cu files that launch it.
#pragma once

#include "fold.h"
#include "launch.h"
#include "types.cuh"

namespace fastlora {

// A block computes a tile of W', a thread kTileThreadRows x kWidth of its elements.
constexpr int kTileRows = 64, kTileColumns = 128, kTileThreadRows = 8;
constexpr int kTileThreads = kTileRows / kTileThreadRows * (kTileColumns / kWidth);
constexpr int kTileRank = 16;  // components that are in shared memory at a time

// Layers as one kernel parameter, of which there are 4 KB.
template <class Layer>
struct LayerGroup {
  static constexpr int kCapacity = (4096 - 16) / (sizeof(Layer) + sizeof(int32_t)) - 1;
  Layer layers[kCapacity];
  int32_t first_tile[kCapacity + 1];
  int32_t count;
};

__device__ __forceinline__ float coefficient(const FoldLayer& p, int64_t k) {
  return static_cast<const float*>(p.gate)[k * p.gate_stride];
}

// Components with a zero coefficient are zeros, whatever U and D hold.
template <class T, class Layer>
__device__ __forceinline__ void load_down(const Layer& p, float c, int64_t k, int64_t column,
                                          float* to) {
  const int64_t at = k * p.down_stride[0] + column * p.down_stride[1];
  const int64_t left = k < p.rank && c != 0.0f ? p.in - column : 0;
  const int count = left < kWidth ? (left < 0 ? 0 : int(left)) : kWidth;
  if (p.down_dtype == p.dtype)
    load_strided(static_cast<const T*>(p.down) + at, p.down_stride[1], count, to);
  else
    load_strided(static_cast<const float*>(p.down) + at, p.down_stride[1], count, to);
}

template <class T, class Layer>
__device__ __forceinline__ float load_factor(const Layer& p, int64_t row, int64_t k) {
  const float c = row < p.out && k < p.rank ? coefficient(p, k) : 0.0f;
  if (c == 0.0f) return 0.0f;
  const int64_t at = row * p.up_stride[0] + k * p.up_stride[1];
  return c * (p.up_dtype == p.dtype ? widen(static_cast<const T*>(p.up)[at])
                                    : static_cast<const float*>(p.up)[at]);
}

template <class T, class Layer>
__global__ void __launch_bounds__(kTileThreads, 3)
    rank_update_kernel(const __grid_constant__ LayerGroup<Layer> group) {
  FASTLORA_SHARED(down, float[kTileRank][kTileColumns]);
  FASTLORA_SHARED(factor, float[kTileRank][kTileRows + 4]);

  int32_t i = 0;
  while (i + 1 < group.count && group.first_tile[i + 1] <= int32_t(blockIdx.x)) ++i;
  const Layer& p = group.layers[i];
  const int32_t tile = int32_t(blockIdx.x) - group.first_tile[i];
  const int32_t tiles_across = (p.in + kTileColumns - 1) / kTileColumns;
  const int64_t first_row = int64_t(tile / tiles_across) * kTileRows;
  const int64_t first_column = int64_t(tile % tiles_across) * kTileColumns;

  constexpr int kGroups = kTileColumns / kWidth;  // of columns, across the tile
  const int thread = int(threadIdx.x);
  const int my_row = thread / kGroups * kTileThreadRows, my_column = thread % kGroups * kWidth;
  float sum[kTileThreadRows][kWidth] = {};

  for (int32_t k0 = 0; k0 < p.rank; k0 += kTileRank) {
    __syncthreads();  // the last components are no longer read
    for (int g = thread; g < kTileRank * kGroups; g += kTileThreads) {
      const int64_t k = k0 + g / kGroups;
      float* to = &down[g / kGroups][g % kGroups * kWidth];
      load_down<T>(p, k < p.rank ? coefficient(p, k) : 0.0f, k, first_column + g % kGroups * kWidth,
                   to);
    }
    for (int e = thread; e < kTileRank * kTileRows; e += kTileThreads)
      factor[e % kTileRank][e / kTileRank] =
          load_factor<T>(p, first_row + e / kTileRank, k0 + e % kTileRank);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTileRank; ++k) {
      float d[kWidth], f[kTileThreadRows];
#pragma unroll
      for (int j = 0; j < kWidth; j += 4)
        *reinterpret_cast<float4*>(d + j) =
            *reinterpret_cast<const float4*>(&down[k][my_column + j]);
#pragma unroll
      for (int m = 0; m < kTileThreadRows; m += 4)
        *reinterpret_cast<float4*>(f + m) =
            *reinterpret_cast<const float4*>(&factor[k][my_row + m]);
#pragma unroll
      for (int m = 0; m < kTileThreadRows; ++m)
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum[m][j] += f[m] * d[j];
    }
  }

  const int64_t column = first_column + my_column;
  if (column >= p.in) return;
  const int count = p.in - column < kWidth ? int(p.in - column) : kWidth;
#pragma unroll
  for (int m = 0; m < kTileThreadRows; ++m) {
    const int64_t row = first_row + my_row + m;
    if (row >= p.out) return;
    float w[kWidth];
    load_strided(
        static_cast<const T*>(p.weight) + row * p.weight_stride[0] + column * p.weight_stride[1],
        p.weight_stride[1], count, w);
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      if (sum[m][j] != 0.0f) w[j] += sum[m][j];  // without a sum even -0 keeps its sign
    store_strided(
        static_cast<T*>(p.result) + row * p.result_stride[0] + column * p.result_stride[1],
        p.result_stride[1], count, w);
  }
}

// Launches for layers of one dtype, a group at a time.
template <class Layer>
class RankUpdate {
 public:
  RankUpdate(DType dtype, void* stream) : dtype_(dtype), stream_(stream) {}

  void add(const Layer& p) {
    const int64_t tiles = ((int64_t(p.out) + kTileRows - 1) / kTileRows) *
                          ((int64_t(p.in) + kTileColumns - 1) / kTileColumns);
    if (tiles == 0) return;
    if (group_.count == group_.kCapacity || tiles > INT32_MAX - tiles_) finish();
    if (tiles > INT32_MAX) throw std::invalid_argument("fold: a layer is too large for one launch");
    group_.layers[group_.count] = p;
    group_.first_tile[group_.count++] = int32_t(tiles_);
    tiles_ += tiles;
  }

  void finish() {
    if (group_.count == 0) return;
    const auto kernel = dtype_ == DType::kFloat16    ? rank_update_kernel<__half, Layer>
                        : dtype_ == DType::kBFloat16 ? rank_update_kernel<__nv_bfloat16, Layer>
                                                     : rank_update_kernel<float, Layer>;
    launch("rank_update", kernel, dim3(unsigned(tiles_)), dim3(kTileThreads), 0, stream_, group_);
    group_.count = 0;
    tiles_ = 0;
  }

 private:
  const DType dtype_;
  void* const stream_;
  LayerGroup<Layer> group_{};
  int64_t tiles_ = 0;
};

}  // namespace fastlora
