// W' = W + U diag(c) Vᵀ for 16-bit weights and factors on tensor cores (sm_80 and newer), a group
// of layers in one launch. The coefficients of a block's layer are computed once into shared
// memory; U's fragments are multiplied with them in float32 and rounded, as the reference rounds U
// diag(c), W is added to the sums in float32. Included by .cu files only.
#pragma once

#include "spectral_layer.cuh"
#include "spectral_tile_sm80.cuh"

namespace fastlora {

using SpectralTiles = WeightTiles<kSpectralRows, kSpectralColumns, true>;
constexpr int32_t kMostCoefficients = 8192;  // that fit beside the stages everywhere

// Both halves of `pair` times c, each rounded once; zero where c is, whatever the pair holds.
template <class T>
__device__ __forceinline__ uint32_t scaled(uint32_t pair, float2 c) {
  const float2 v = unpack<T>(pair);
  const uint32_t keep = (c.x != 0.0f ? 0xffffu : 0u) | (c.y != 0.0f ? 0xffff0000u : 0u);
  return pack<T>(c.x * v.x, c.y * v.y) & keep;
}

template <class T, class Group>
__global__ void __launch_bounds__(kSpectralThreads, 2)
    spectral_weight_sm80_kernel(const __grid_constant__ Group group) {
  char* const memory = static_cast<char*>(dynamic_shared());
  float* const coefficients = reinterpret_cast<float*>(memory + kSpectralBytes);
  const Tile tile = tile_of<SpectralTiles>(group, int32_t(blockIdx.x));
  const auto& p = group.layers[tile.layer];
  const int thread = int(threadIdx.x), lane = thread % 32;
  const int warp_row = thread / 64 * 64, warp_column = thread / 32 % 2 * 64;

  const int steps = (p.rank + kSpectralDepth - 1) / kSpectralDepth;
  for (int k = thread; k < steps * kSpectralDepth; k += kSpectralThreads)
    *writable(coefficients + k) = k < p.rank ? coefficient(p, k) : 0.0f;
  __syncthreads();

  prefetch_box(Part<T>(p.weight, p.weight_stride, p.out, p.in, tile.row, tile.column));
  const Part<T> u(p.u, p.u_stride, p.out, p.rank, tile.row, 0);
  const Part<T> vh(p.vh, p.vh_stride, p.rank, p.in, 0, tile.column);
  WarpSum sum = {};
  pipeline(
      memory, steps,
      [&](int step, char* stage) {
        copy_rows(stage, u, step * kSpectralDepth);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int k = thread / 16 + i * 8, row = step * kSpectralDepth + k;
          copy_eight(place_across(stage + kOperandBytes, k, thread % 16), vh, row, thread % 16 * 8,
                     coefficients[row] != 0.0f);
        }
      },
      [&](int step, char* stage) {
#pragma unroll
        for (int k16 = 0; k16 < kSpectralDepth / 16; ++k16) {
          const float* at = coefficients + step * kSpectralDepth + k16 * 16 + lane % 4 * 2;
          const float2 near = *reinterpret_cast<const float2*>(readable(at, 2, 8));
          const float2 far = *reinterpret_cast<const float2*>(readable(at + 8, 2, 8));
          uint32_t a[4][4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            load_rows(a[i], stage, warp_row + i * 16, k16);
#pragma unroll
            for (int e = 0; e < 4; ++e) a[i][e] = scaled<T>(a[i][e], e < 2 ? near : far);
          }
#pragma unroll
          for (int j = 0; j < 8; j += 2) {
            uint32_t b[4];
            load_across(b, stage + kOperandBytes, warp_column + j * 8, k16);
            multiply_pair<T>(sum, j, a, b);
          }
        }
      });

  T* const box = reinterpret_cast<T*>(memory);
  fill_box(box, Part<T>(p.weight, p.weight_stride, p.out, p.in, tile.row, tile.column));
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint32_t* at = writable(pair_in(box, warp_row + i * 16 + half * 8 + lane / 4,
                                        warp_column + j * 8 + lane % 4 * 2));
        const float2 w = unpack<T>(*at);
        const float x = sum[i][j][half * 2], y = sum[i][j][half * 2 + 1];
        // without a sum even -0 keeps its sign
        *at = pack<T>(x != 0.0f ? w.x + x : w.x, y != 0.0f ? w.y + y : w.y);
      }
  __syncthreads();
  for (int e = thread; e < kSpectralRows * 16; e += kSpectralThreads) {
    const int32_t row = tile.row + e / 16, column = tile.column + e % 16 * 8;
    if (row >= p.out) break;
    const T* from = box + e / 16 * kBoxPitch + e % 16 * 8;
    T* to = static_cast<T*>(p.result) + int64_t(row) * p.result_stride[0] +
            int64_t(column) * p.result_stride[1];
    store_packet(to, p.result_stride[1], elements_left(column, p.in), load_packet(from, 1, 8));
  }
}

inline bool takes_spectral_sm80(const DeviceSpectral& p) {
  return !p.u_wide && !p.vh_wide && p.rank <= kMostCoefficients;
}

template <class T>
void launch_spectral_weights_sm80(const std::vector<DeviceSpectral>& layers, void* stream) {
  for_each_group<SpectralTiles>(layers, [&](const auto& group, dim3 tiles) {
    int32_t rank = 0;
    for (int32_t i = 0; i < group.count; ++i)
      rank = group.layers[i].rank > rank ? group.layers[i].rank : rank;
    const int bytes =
        kSpectralBytes + (rank + kSpectralDepth - 1) / kSpectralDepth * kSpectralDepth * 4;
    const auto kernel = spectral_weight_sm80_kernel<T, std::decay_t<decltype(group)>>;
    allow_shared_memory(kernel, kSpectralBytes + kMostCoefficients * 4);
    launch("spectral_weight_sm80", kernel, tiles, dim3(kSpectralThreads), size_t(bytes), stream,
           group);
  });
}

}  // namespace fastlora
