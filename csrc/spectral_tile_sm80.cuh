// What spectral_weights and spectral_dots share on tensor cores (sm_80 and newer): a block of four
// warps computes 128 x 128 of a product of 16-bit operands, a warp 64 x 64 of it, in steps of 32
// along the summed index, kSpectralStages - 1 of them on their way (cp.async). Included by .cu
// files only.
#pragma once

#include "launch.h"
#include "ptx.cuh"
#include "types.cuh"

namespace fastlora {

constexpr int kSpectralThreads = 128;
constexpr int kSpectralRows = 128, kSpectralColumns = 128;  // of a block's tile
constexpr int kSpectralDepth = 32, kSpectralStages = 3;
constexpr int kOperandBytes = 128 * kSpectralDepth * 2;  // of A or B in one stage
constexpr int kSpectralBytes = kSpectralStages * 2 * kOperandBytes;
constexpr int kBoxPitch = kSpectralColumns + 8;  // elements; rows fall into different banks
static_assert(kSpectralRows * kBoxPitch * 2 <= kSpectralBytes, "the box takes the stages' place");

// A matrix of 16-bit elements from some row and column of it on.
template <class T>
struct Part {
  const T* data;
  int32_t stride[2];
  int32_t rows, columns;  // that are left
  bool vectors;           // 16 bytes at a time, from every eighth column on

  __device__ __forceinline__ Part(const void* matrix, const int32_t (&strides)[2], int32_t all_rows,
                                  int32_t all_columns, int32_t row, int32_t column)
      : data(static_cast<const T*>(matrix) + int64_t(row) * strides[0] +
             int64_t(column) * strides[1]),
        stride{strides[0], strides[1]},
        rows(all_rows - row),
        columns(all_columns - column),
        vectors(strides[1] == 1 && strides[0] % 8 == 0 && aligned16(matrix)) {}
};

// Eight elements of row `row` from `column` on into shared memory, zeros beyond the edges and where
// `wanted` is not.
template <class T>
__device__ __forceinline__ void copy_eight(void* to, const Part<T>& p, int32_t row, int32_t column,
                                           bool wanted = true) {
  const int count = wanted && row < p.rows ? elements_left(column, p.columns) : 0;
  const T* from = p.data + int64_t(row) * p.stride[0] + int64_t(column) * p.stride[1];
  if (p.vectors)
    copy_async<16>(to, count > 0 ? from : p.data, count * 2);
  else
    *reinterpret_cast<uint4*>(writable(static_cast<char*>(to), 16, 16)) =
        load_packet(from, p.stride[1], count).bits;
}

// 128 rows of an operand whose rows run along the summed index, from k on.
template <class T>
__device__ __forceinline__ void copy_rows(char* operand, const Part<T>& p, int32_t k) {
  const int thread = int(threadIdx.x);
#pragma unroll 1  // addresses of several groups at a time would not fit beside the sums
  for (int i = 0; i < 4; ++i) {
    const int row = thread / 4 + i * 32, group = thread % 4;
    copy_eight(place(operand, row, group), p, row, k + group * 8);
  }
}

// Where group `group` of row k lies in an operand of kSpectralDepth rows of 128 columns: eight rows
// of one group in different banks.
__device__ __forceinline__ char* place_across(char* operand, int k, int group) {
  return operand + k * 256 + ((group ^ (k & 7)) << 4);
}

// The fragments of A: 16 rows from `row` on, 16 of the summed index.
__device__ __forceinline__ void load_rows(uint32_t (&a)[4], char* operand, int row, int k16) {
  const int lane = int(threadIdx.x) % 32;
  load_matrices(a, place(operand, row + lane % 16, k16 * 2 + lane / 16));
}

// The fragments of B, two tiles of eight columns, where its rows run along the summed index.
__device__ __forceinline__ void load_columns(uint32_t (&b)[4], char* operand, int column, int k16) {
  const int lane = int(threadIdx.x) % 32;
  const int row = column + lane / 16 * 8 + lane % 8;
  load_matrices(b, place(operand, row, k16 * 2 + lane / 8 % 2));
}

// The same where they run across it.
__device__ __forceinline__ void load_across(uint32_t (&b)[4], char* operand, int column, int k16) {
  const int lane = int(threadIdx.x) % 32;
  load_matrices<4, true>(b, place_across(operand, k16 * 16 + lane % 16, column / 8 + lane / 16));
}

// A warp's part of the tile: rows i * 16 + half * 8 + lane / 4, columns j * 8 + lane % 4 * 2 and
// the next of it are sum[i][j][half * 2] and [half * 2 + 1].
using WarpSum = float[4][8][4];

template <class T>
__device__ __forceinline__ void multiply_pair(WarpSum& sum, int j, const uint32_t (&a)[4][4],
                                              const uint32_t (&b)[4]) {
  const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    multiply<T>(sum[i][j], a[i], left);
    multiply<T>(sum[i][j + 1], a[i], right);
  }
}

// `copy(step, stage)` starts what a step needs, `use(step, stage)` computes with it. All of shared
// memory is free afterwards.
template <class Copy, class Use>
__device__ __forceinline__ void pipeline(char* memory, int steps, const Copy& copy,
                                         const Use& use) {
  const auto stage = [&](int step) {
    return memory + step % kSpectralStages * (2 * kOperandBytes);
  };
#pragma unroll
  for (int s = 0; s < kSpectralStages - 1; ++s) {
    if (s < steps) copy(s, stage(s));
    commit_copies();
  }
  for (int step = 0; step < steps; ++step) {
    wait_copies<kSpectralStages - 2>();
    __syncthreads();  // the stage is there, and the one before it is no longer read
    const int next = step + kSpectralStages - 1;
    if (next < steps) copy(next, stage(next));
    commit_copies();
    use(step, stage(step));
  }
  wait_copies<0>();
  __syncthreads();
}

// Brings 128 x 128 elements towards the chip that will be wanted after the arithmetic.
template <class T>
__device__ __forceinline__ void prefetch_box(const Part<T>& p) {
  const int row = int(threadIdx.x);
  static_assert(kSpectralThreads == kSpectralRows, "a row each, two lines");
  if (row >= p.rows) return;
  for (int column = 0; column < kSpectralColumns; column += 64)
    if (column < p.columns)
      prefetch(p.data + int64_t(row) * p.stride[0] + int64_t(column) * p.stride[1]);
}

// A matrix' 128 x 128 elements in shared memory, zeros beyond its edges.
template <class T>
__device__ __forceinline__ void fill_box(T* box, const Part<T>& p) {
#pragma unroll 4
  for (int e = int(threadIdx.x); e < kSpectralRows * 16; e += kSpectralThreads)
    copy_eight(box + e / 16 * kBoxPitch + e % 16 * 8, p, e / 16, e % 16 * 8);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
}

// Two neighbours in the box.
template <class T>
__device__ __forceinline__ uint32_t* pair_in(T* box, int row, int column) {
  return reinterpret_cast<uint32_t*>(box + row * kBoxPitch + column);
}

}  // namespace fastlora
