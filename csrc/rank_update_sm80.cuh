// W' = W + U diag(c) D for 16-bit weights on tensor cores (sm_80 and newer), at the speed of memory
// where the rank allows it. Included by .cu files only.
//
// Only one rounding may show, that of W'. So U diag(c) is made in float32 and split into two
// bfloat16 parts, high + low, which are off by 2^-18 of it at most; so is D, unless it is bfloat16
// itself: (high + low) D then costs two products, else three (low · low is 2^-18 of the whole).
// The parts are bfloat16 beside float16 weights too, because its range is that of float32.
//
// A warp computes 16 x 64 of the tile. W' of one row lies in four lanes' sums, two neighbours each
// eight columns; D's columns are put into shared memory in such an order that these neighbours make
// up eight: W then goes from memory to those who add to it and back, 16 bytes at a time. It is on
// its way during all of the arithmetic, to a place of its thread's in shared memory: no register
// waits for it, and no barrier is needed.
#pragma once

#include "layer_group.cuh"
#include "ptx.cuh"

namespace fastlora {

constexpr int kTileRows = 64, kTileColumns = 128;  // of W', what a block computes
using UpdateTiles = WeightTiles<kTileRows, kTileColumns>;

constexpr int kTensorThreads = 256, kWarpColumns = 64;
constexpr int kChunk = 32;  // components in shared memory at a time: rows of 64 bytes
constexpr int kDownPitch = kTileColumns + 8;

// v = high + low, but for 2^-18 of it, as packed bfloat16.
__device__ __forceinline__ void split(const float (&v)[kWidth], uint32_t (&high)[4],
                                      uint32_t (&low)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    high[i] = pack<__nv_bfloat16>(v[2 * i], v[2 * i + 1]);
    low[i] = pack<__nv_bfloat16>(v[2 * i] - __uint_as_float(high[i] << 16),
                                 v[2 * i + 1] - __uint_as_float(high[i] & 0xffff0000u));
  }
}

template <class T>
__device__ __forceinline__ void widen_all(const Packet<T>& packet, float (&to)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) to[i] = widen(packet.elements[i]);
}

template <class T, class Group>
__global__ void __launch_bounds__(kTensorThreads, 3)
    rank_update_sm80_kernel(const __grid_constant__ Group group) {
  FASTLORA_SHARED(factor, char[2][kTileRows * kChunk * 2]);    // high, low
  FASTLORA_SHARED(down, uint32_t[2][kChunk][kDownPitch / 2]);  // the same
  const Tile tile = tile_of<UpdateTiles>(group, int32_t(blockIdx.x));
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const bool split_down = !std::is_same_v<T, __nv_bfloat16> || group.layers[tile.layer].down_wide;

  // Of W: rows lane / 4 and that + 8 of the warp's, two times eight columns.
  const int32_t first_row = tile.row + warp % 4 * 16 + lane / 4;
  const int32_t first_column = tile.column + warp / 4 * kWarpColumns + lane % 4 * kWidth;
  FASTLORA_SHARED(weight, Packet<T>[2][2][kTensorThreads]);  // each thread's own
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const auto& p = group.layers[tile.layer];
      const int32_t row = first_row + i * 8, column = first_column + j * 32;
      const int count = row < p.out ? elements_left(column, p.in) : 0;
      const T* from = static_cast<const T*>(p.weight) + int64_t(row) * p.weight_stride[0] +
                      int64_t(column) * p.weight_stride[1];
      if (p.weight_stride[1] == 1 && count == kWidth && aligned16(from))
        copy_async<16>(&weight[i][j][thread], from);
      else
        weight[i][j][thread] = load_packet(from, p.weight_stride[1], count);
    }
  commit_copies();

  // Of a chunk: eight components of a row of U, and of a row of D eight columns in each half.
  const int up_row = thread / 4, up_k = thread % 4 * kWidth, down_k = thread / 8;
  const int32_t down_column = tile.column + thread % 8 * kWidth;
  float sum[kWarpColumns / 8][4] = {};
  const int32_t rank = group.layers[tile.layer].rank;
  for (int32_t k0 = 0; k0 < rank; k0 += kChunk) {
    const auto& p = group.layers[opaque(tile.layer)];
    Packet<T> u;
    const int up_count = tile.row + up_row < p.out ? elements_left(k0 + up_k, p.rank) : 0;
    const int64_t up_at =
        int64_t(tile.row + up_row) * p.up_stride[0] + int64_t(k0 + up_k) * p.up_stride[1];
    const int64_t down_at =
        int64_t(k0 + down_k) * p.down_stride[0] + int64_t(down_column) * p.down_stride[1];
    const int64_t half_a_row = int64_t(kWarpColumns) * p.down_stride[1];
    // A lane knows one coefficient of the chunk and asks the others for theirs.
    const float mine = k0 + lane < p.rank ? coefficient(p, k0 + lane) : 0.0f;
    if (!p.up_wide) u = load_packet(static_cast<const T*>(p.up) + up_at, p.up_stride[1], up_count);
    const auto load_down_packet = [&](int half) {
      return load_packet(
          static_cast<const T*>(p.down) + down_at + half * half_a_row, p.down_stride[1],
          k0 + down_k < p.rank ? elements_left(down_column + half * kWarpColumns, p.in) : 0);
    };
    const bool on = __shfl_sync(0xffffffffu, mine, down_k) != 0.0f;
    float v[kWidth];
    uint32_t high[4], low[4];
    // Components with a zero coefficient are zeros, whatever U and D hold.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (split_down) {
        if (p.down_wide) {
          const float* from = static_cast<const float*>(p.down) + down_at + half * half_a_row;
          const int count = on ? elements_left(down_column + half * kWarpColumns, p.in) : 0;
#pragma unroll
          for (int i = 0; i < kWidth; ++i, from += p.down_stride[1])
            v[i] = i < count ? *readable(from) : 0.0f;
        } else {
          widen_all(load_down_packet(half), v);
        }
        split(v, high, low);
      } else {
        const uint4 bits = load_down_packet(half).bits;
        high[0] = bits.x, high[1] = bits.y, high[2] = bits.z, high[3] = bits.w;
      }
      // Pair i of eight columns goes to column tile i, or 4 + i, where lane % 4 has its neighbours.
      const int at = half * (kWarpColumns / 2) + thread % 8 / 4 * 16 + thread % 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        *writable(&down[0][down_k][at + i * 4]) = on ? high[i] : 0u;
        if (split_down) *writable(&down[1][down_k][at + i * 4]) = on ? low[i] : 0u;
      }
    }
    if (p.up_wide) {
      const float* from = static_cast<const float*>(p.up) + up_at;
#pragma unroll
      for (int i = 0; i < kWidth; ++i, from += p.up_stride[1])
        v[i] = i < up_count ? *readable(from) : 0.0f;
    } else {
      widen_all(u, v);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float c = __shfl_sync(0xffffffffu, mine, up_k + i);
      v[i] = c != 0.0f ? c * v[i] : 0.0f;
    }
    split(v, high, low);
    *reinterpret_cast<uint4*>(writable(place(factor[0], up_row, thread % 4), 16, 16)) =
        make_uint4(high[0], high[1], high[2], high[3]);
    *reinterpret_cast<uint4*>(writable(place(factor[1], up_row, thread % 4), 16, 16)) =
        make_uint4(low[0], low[1], low[2], low[3]);
    __syncthreads();
#pragma unroll 1  // what 80 registers allow
    for (int k16 = 0; k16 < kChunk / 16; ++k16) {
      if (k0 + k16 * 16 >= rank) break;
      uint32_t a[2][4];
#pragma unroll
      for (int part = 0; part < 2; ++part)
        load_matrices(a[part], place(factor[part], warp % 4 * 16 + lane % 16, k16 * 2 + lane / 16));
      const int from = k16 * 16 + lane % 16, across = warp / 4 * (kWarpColumns / 2) + lane / 16 * 4;
#pragma unroll
      for (int j = 0; j < kWarpColumns / 8; j += 2) {
        uint32_t b[4];
        load_matrices<4, true>(b, &down[0][from][across + j * 4]);
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          multiply<__nv_bfloat16>(sum[j], a[part], left);
          multiply<__nv_bfloat16>(sum[j + 1], a[part], right);
        }
        if (split_down) {
          load_matrices<4, true>(b, &down[1][from][across + j * 4]);
          const uint32_t low_left[2] = {b[0], b[1]}, low_right[2] = {b[2], b[3]};
          multiply<__nv_bfloat16>(sum[j], a[0], low_left);
          multiply<__nv_bfloat16>(sum[j + 1], a[0], low_right);
        }
      }
    }
    __syncthreads();  // the chunk is no longer read
  }

  wait_copies<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const auto& p = group.layers[opaque(tile.layer)];
      const int32_t row = first_row + i * 8, column = first_column + j * 32;
      const int count = row < p.out ? elements_left(column, p.in) : 0;
      Packet<T> w = weight[i][j][thread];
      float v[kWidth];
      widen_all(w, v);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const float s = sum[j * 4 + e / 2][i * 2 + e % 2];
        if (s != 0.0f) v[e] += s;  // without a sum even -0 keeps its sign
      }
      w.bits = make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]),
                          pack<T>(v[6], v[7]));
      store_packet(
          static_cast<T*>(p.result) + row * p.result_stride[0] + column * p.result_stride[1],
          p.result_stride[1], count, w);
    }
}

}  // namespace fastlora
