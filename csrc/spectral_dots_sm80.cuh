// p_i = u_iᵀ G v_i for 16-bit operands on tensor cores (sm_80 and newer), a group of layers in one
// launch. A block computes 128 x 128 of G V, multiplies it with U where it lies, in registers, and
// sums its rows. Included by .cu files only.
#pragma once

#include "spectral_layer.cuh"
#include "spectral_tile_sm80.cuh"

namespace fastlora {

using DotsTiles = ProductTiles<kSpectralRows, kSpectralColumns, true>;

template <class T, class Group>
__global__ void __launch_bounds__(kSpectralThreads, 2)
    spectral_dots_sm80_kernel(const __grid_constant__ Group group) {
  char* const memory = static_cast<char*>(dynamic_shared());
  const Tile tile = tile_of<DotsTiles>(group, int32_t(blockIdx.x));
  const auto& p = group.layers[tile.layer];
  const int thread = int(threadIdx.x), lane = thread % 32;
  const int warp_row = thread / 64 * 64, warp_column = thread / 32 % 2 * 64;

  prefetch_box(Part<T>(p.u, p.u_stride, p.out, p.rank, tile.row, tile.column));
  const Part<T> grad(p.grad, p.grad_stride, p.out, p.in, tile.row, 0);
  const Part<T> vh(p.vh, p.vh_stride, p.rank, p.in, tile.column, 0);
  WarpSum sum = {};
  pipeline(
      memory, (p.in + kSpectralDepth - 1) / kSpectralDepth,
      [&](int step, char* stage) {
        copy_rows(stage, grad, step * kSpectralDepth);
        copy_rows(stage + kOperandBytes, vh, step * kSpectralDepth);
      },
      [&](int, char* stage) {
#pragma unroll
        for (int k16 = 0; k16 < kSpectralDepth / 16; ++k16) {
          uint32_t a[4][4];
#pragma unroll
          for (int i = 0; i < 4; ++i) load_rows(a[i], stage, warp_row + i * 16, k16);
#pragma unroll
          for (int j = 0; j < 8; j += 2) {
            uint32_t b[4];
            load_columns(b, stage + kOperandBytes, warp_column + j * 8, k16);
            multiply_pair<T>(sum, j, a, b);
          }
        }
      });

  T* const box = reinterpret_cast<T*>(memory);
  fill_box(box, Part<T>(p.u, p.u_stride, p.out, p.rank, tile.row, tile.column));
  // Every sum in the same order: a lane's rows, the lanes of a column, the two warps of it.
  FASTLORA_SHARED(columns, float[2][kSpectralColumns]);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int column = warp_column + j * 8 + lane % 4 * 2;
    float dot[2] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 u =
            unpack<T>(*readable(pair_in(box, warp_row + i * 16 + half * 8 + lane / 4, column)));
        dot[0] += sum[i][j][half * 2] * u.x;
        dot[1] += sum[i][j][half * 2 + 1] * u.y;
      }
#pragma unroll
    for (int bits = 4; bits < 32; bits *= 2)
#pragma unroll
      for (int c = 0; c < 2; ++c) dot[c] += __shfl_xor_sync(0xffffffffu, dot[c], bits);
    if (lane < 4)
      for (int c = 0; c < 2; ++c) columns[warp_row / 64][column + c] = dot[c];
  }
  __syncthreads();
  if (tile.column + thread < p.rank)
    *writable(p.partial + int64_t(tile.row / kSpectralRows) * p.rank + tile.column + thread) =
        columns[0][thread] + columns[1][thread];
}

inline bool takes_spectral_sm80(const DeviceDots& p) { return !p.u_wide && !p.vh_wide; }

template <class T>
void launch_spectral_dots_sm80(const std::vector<DeviceDots>& layers, void* stream) {
  for_each_group<DotsTiles>(layers, [&](const auto& group, dim3 tiles) {
    const auto kernel = spectral_dots_sm80_kernel<T, std::decay_t<decltype(group)>>;
    allow_shared_memory(kernel, kSpectralBytes);
    launch("spectral_dots_sm80", kernel, tiles, dim3(kSpectralThreads), kSpectralBytes, stream,
           group);
  });
}

}  // namespace fastlora
