// One main loop on tensor cores (mma.sync, ldmatrix, cp.async) for 16-bit operands, sm_80 and
// newer:
//
//   y = m ∘ (A Bᵀ + [second product]) + b,  or  y += ...,  or  h = (A Bᵀ) ∘ g
//
// The second product is either more steps of the same loop, over (h, U) in memory, or one more
// product whose A operand stays in registers: kAppended rows of D ride along with B, their columns
// of the result are gated, rounded once and multiplied with U. Included by .cu files only.
//
// A block has kWarps warps, each with kRowTiles x 16 rows of the tile and all of its columns, so
// that a warp has whole rows of the appended columns. Shared memory holds kStages steps of kDepth
// inputs, in rows of 64 bytes.
#pragma once

#include <type_traits>

#include "launch.h"
#include "ptx.cuh"
#include "types.cuh"

namespace fastlora {

// A matrix [rows, k] that a product sums over k.
template <class T>
struct Operand {
  const T* data;
  int64_t rows, row_stride, k_stride;
};

template <class T>
struct Source {
  Operand<T> a, b;  // [tokens, k], [columns, k]
  int64_t k;        // 0: contributes nothing
};

template <class T>
struct Problem {
  Source<T> first, second;  // x·Wᵀ (or nothing), h·Uᵀ
  Operand<T> appended;      // D, where h is made on the way: second.a is not read then
  T* y;
  const T *bias, *row_scale;  // or null
  int64_t tokens, columns, y_stride[2], bias_stride, row_scale_stride;
  const float* gate;  // or null; multiplies the columns, or the appended ones
  int64_t gate_stride[2], tokens_per_row;
  bool add;        // to what y holds
  bool dependent;  // second.a is written by the kernel before this one
};

template <int kWarps_, int kRowTiles_, int kColumnTiles_, int kAppended_, int kStages_>
struct Shape {
  static constexpr int kWarps = kWarps_, kRowTiles = kRowTiles_, kColumnTiles = kColumnTiles_;
  static constexpr int kAppended = kAppended_, kStages = kStages_;
  static constexpr int kThreads = 32 * kWarps, kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows, kColumns = 8 * kColumnTiles;
  static constexpr int kDepth = 32;  // inputs of a step: two steps of the matrix instruction
  static constexpr int kGroups = kDepth * 2 / 16;
  static constexpr int kTileRows = kRows + kColumns + kAppended;
  static constexpr int kCopyRows = kThreads / kGroups;  // rows that the block copies at a time
  static constexpr int kCopies = (kTileRows + kCopyRows - 1) / kCopyRows;
  static constexpr int kStageBytes = kTileRows * kDepth * 2;
  static constexpr int kPitch = kColumns + 8;  // of the result on its way out
  static constexpr int kPipeline = kStages * kStageBytes, kResult = kRows * kPitch * 2;
  static constexpr int kSharedBytes = kPipeline > kResult ? kPipeline : kResult;
  static_assert(kColumnTiles % 2 == 0 && kAppended % 16 == 0 && kAppended <= kDepth, "pairs");
  static_assert(kCopyRows % 8 == 0 && kRows % kCopyRows == 0, "copies keep their bank and source");
};

// kDepth elements from k0 on of one row, zeros beyond the edges; a thread copies one group.
template <class T>
__device__ __forceinline__ void copy_group(char* stage, int row, int group, const Operand<T>& p,
                                           int64_t index, int64_t k0, int64_t k_end, bool vectors) {
  char* to = place(stage, row, group);
  const int64_t k = k0 + group * 8;
  const int64_t left = index < p.rows ? k_end - k : 0;
  const int count = left < 8 ? (left < 0 ? 0 : int(left)) : 8;
  if (vectors) {
    copy_async<16>(to, count > 0 ? p.data + index * p.row_stride + k : p.data, count * 2);
    return;
  }
  Packet<T> packet;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    narrow(0.0f, &packet.elements[i]);
    if (i < count)
      packet.elements[i] = *readable(p.data + index * p.row_stride + (k + i) * p.k_stride);
  }
  *reinterpret_cast<uint4*>(writable(to, 16, 16)) = packet.bits;
}

template <class T>
__device__ __forceinline__ bool vectors_of(const Operand<T>& p) {
  return p.k_stride == 1 && p.row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(p.data) % 16 == 0;
}

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, S::kThreads <= 128 ? 2 : 1)
    gemm_kernel(const __grid_constant__ Problem<T> p) {
  char* const memory = static_cast<char*>(dynamic_shared());
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t first_token = int64_t(blockIdx.x) * S::kRows;
  const int64_t first_column = int64_t(blockIdx.y) * S::kColumns;
  const int first_steps = int((p.first.k + S::kDepth - 1) / S::kDepth);
  const int steps = first_steps + int((p.second.k + S::kDepth - 1) / S::kDepth);
  const bool a1 = vectors_of(p.first.a), b1 = vectors_of(p.first.b), a2 = vectors_of(p.second.a);
  const bool b2 = vectors_of(p.second.b), d1 = vectors_of(p.appended);
  let_next_kernel_start();
  if (p.add && p.y_stride[1] == 1) {  // y will be read after the arithmetic
    constexpr int kLines = (S::kColumns + 63) / 64;
    for (int e = thread; e < S::kRows * kLines; e += S::kThreads) {
      const int64_t token = first_token + e / kLines, column = first_column + e % kLines * 64;
      if (token < p.tokens && column < p.columns) prefetch(p.y + token * p.y_stride[0] + column);
    }
  }

  // Of every step a thread copies one group of eight inputs in rows of its own, kCopyRows apart.
  // Where they lie is worked out once for each source: a step of arithmetic leaves no time for it.
  // Rows and columns beyond the edge are the last ones once more, whose results are not stored;
  // rows of D beyond its end are zeros, because they are summed over.
  const int my_row = thread / S::kGroups, my_group = thread % S::kGroups;
  const T* from[S::kCopies];
  bool vectors = false;
  auto aim = [&](bool first) {
    const Source<T>& source = first ? p.first : p.second;
    vectors = first ? (a1 && b1 && (S::kAppended == 0 || d1)) : (b2 && (S::kAppended > 0 || a2));
#pragma unroll
    for (int i = 0; i < S::kCopies; ++i) {
      const int row = my_row + i * S::kCopyRows;
      const Operand<T>& operand = row < S::kRows                 ? source.a
                                  : row < S::kRows + S::kColumns ? source.b
                                                                 : p.appended;
      const int64_t index = row < S::kRows                 ? first_token + row
                            : row < S::kRows + S::kColumns ? first_column + row - S::kRows
                                                           : int64_t(row) - S::kRows - S::kColumns;
      const int64_t last = operand.rows - 1;
      from[i] = operand.data + (index < last ? index : last) * operand.row_stride + my_group * 8;
    }
  };
  auto copy_slowly = [&](char* stage, const Source<T>& source, bool first, int64_t k0) {
#pragma unroll 1
    for (int row = my_row; row < S::kTileRows; row += S::kCopyRows) {
      if (row < S::kRows) {
        if (first || S::kAppended == 0)
          copy_group(stage, row, my_group, source.a, first_token + row, k0, source.k,
                     first ? a1 : a2);
      } else if (row < S::kRows + S::kColumns) {
        copy_group(stage, row, my_group, source.b, first_column + row - S::kRows, k0, source.k,
                   first ? b1 : b2);
      } else if (first) {
        copy_group(stage, row, my_group, p.appended, row - S::kRows - S::kColumns, k0, source.k,
                   d1);
      }
    }
  };
  auto copy_step = [&](int step) {
    char* stage = memory + step % S::kStages * S::kStageBytes;
    const bool first = step < first_steps;
    if (!first && step == first_steps && p.dependent) wait_for_previous_kernel();
    if (step == 0 || step == first_steps) aim(first);
    const int64_t k0 = int64_t(first ? step : step - first_steps) * S::kDepth;
    const Source<T>& source = first ? p.first : p.second;
    const int64_t left = source.k - k0;
    if (!vectors || left < S::kDepth) return copy_slowly(stage, source, first, k0);
    char* const to = place(stage, my_row, my_group);  // rows apart by multiples of eight: no change
#pragma unroll
    for (int i = 0; i < S::kCopies; ++i) {
      const int row = i * S::kCopyRows;  // the first of these
      if (row + S::kCopyRows > S::kTileRows && my_row + row >= S::kTileRows) break;
      if (row >= S::kRows + S::kColumns ? !first : row < S::kRows && S::kAppended > 0 && !first)
        continue;
      copy_async<16>(
          to + row * 64, from[i] + k0,
          row < S::kRows + S::kColumns || my_row + row - S::kRows - S::kColumns < p.appended.rows
              ? 16
              : 0);
    }
  };

  float sum[S::kRowTiles][S::kColumnTiles][4] = {};
  constexpr int kAppendedTiles = S::kAppended / 8;
  float h[S::kRowTiles][kAppendedTiles > 0 ? kAppendedTiles : 1][4] = {};

  // Columns `column` .. of the stage's B rows, times `a`, into two tiles of a sum.
  auto two_tiles = [&](char* stage, int column, int half, const uint32_t (&a)[S::kRowTiles][4],
                       auto& into, int tile) {
    uint32_t b[4];
    const int row = S::kRows + column + lane / 16 * 8 + lane % 8;
    load_matrices(b, place(stage, row, half * 2 + lane / 8 % 2));
    const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
      multiply<T>(into[i][tile], a[i], left);
      multiply<T>(into[i][tile + 1], a[i], right);
    }
  };
  // The stage of a step, once it is there; the one before it is no longer read and takes another.
  auto next_stage = [&](int step) {
    wait_copies<S::kStages - 2>();
    __syncthreads();
    if (step + S::kStages - 1 < steps) copy_step(step + S::kStages - 1);
    commit_copies();
    return memory + step % S::kStages * S::kStageBytes;
  };

#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (s < steps) copy_step(s);
    commit_copies();
  }
  const int in_memory = S::kAppended > 0 ? first_steps : steps;
  for (int step = 0; step < in_memory; ++step) {
    char* stage = next_stage(step);
#pragma unroll
    for (int half = 0; half < S::kDepth / 16; ++half) {
      uint32_t a[S::kRowTiles][4];
#pragma unroll
      for (int i = 0; i < S::kRowTiles; ++i)
        load_matrices(a[i],
                      place(stage, warp * S::kWarpRows + i * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < kAppendedTiles; j += 2)
        two_tiles(stage, S::kColumns + j * 8, half, a, h, j);
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; j += 2) two_tiles(stage, j * 8, half, a, sum, j);
    }
  }
  if constexpr (S::kAppended > 0) {
    char* stage = next_stage(first_steps);
    // Two columns of a row of h, gated and rounded: what lies in one register of a sum's tile lies
    // in one of the A operand's.
    auto gated = [&](int i, int j, int half) {
      const int64_t token = first_token + warp * S::kWarpRows + i * 16 + half * 8 + lane / 4;
      const int r = j * 8 + lane % 4 * 2;
      float g[2] = {0.0f, 0.0f};
      if (token < p.tokens) {
        const float* row = p.gate + token / p.tokens_per_row * p.gate_stride[0];
        if (r < p.second.k) g[0] = row[r * p.gate_stride[1]];
        if (r + 1 < p.second.k) g[1] = row[(r + 1) * p.gate_stride[1]];
      }
      return pack<T>(h[i][j][half * 2] * g[0], h[i][j][half * 2 + 1] * g[1]);
    };
#pragma unroll
    for (int k16 = 0; k16 < S::kAppended / 16; ++k16) {
      uint32_t a[S::kRowTiles][4];
#pragma unroll
      for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) a[i][k] = gated(i, k16 * 2 + k / 2, k % 2);
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; j += 2) two_tiles(stage, j * 8, k16, a, sum, j);
    }
  }
  wait_copies<0>();

  const bool staged =
      p.y_stride[1] == 1 && p.y_stride[0] % 8 == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
  T* const box = reinterpret_cast<T*>(memory);
  __syncthreads();  // the stages are no longer read
  // `put(row, column in the tile, value)` for every element of this thread, with gates of a product
  // that is h itself, row scale and bias.
  auto finish = [&](auto put) {
#pragma unroll
    for (int j = 0; j < S::kColumnTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int at = j * 8 + lane % 4 * 2 + c;
        const int64_t column = first_column + at;
        const bool inside = column < p.columns;
        const float scale = inside && p.row_scale != nullptr
                                ? widen(p.row_scale[column * p.row_scale_stride])
                                : 1.0f;
        const float bias =
            inside && p.bias != nullptr ? widen(p.bias[column * p.bias_stride]) : 0.0f;
#pragma unroll
        for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = warp * S::kWarpRows + i * 16 + half * 8 + lane / 4;
            const int64_t token = first_token + row;
            float v = sum[i][j][half * 2 + c];
            if (S::kAppended == 0 && p.gate != nullptr && inside && token < p.tokens)
              v *= p.gate[token / p.tokens_per_row * p.gate_stride[0] + column * p.gate_stride[1]];
            put(row, at, v, scale, bias);
          }
      }
    }
  };
  auto scaled = [&](float v, float scale, float bias) {
    if (p.row_scale != nullptr) v *= scale;
    return p.bias != nullptr ? v + bias : v;
  };
  if (!staged) {
    finish([&](int row, int at, float v, float scale, float bias) {
      const int64_t token = first_token + row, column = first_column + at;
      if (token >= p.tokens || column >= p.columns) return;
      T* y = p.y + token * p.y_stride[0] + column * p.y_stride[1];
      if (p.add) v += widen(*readable(y));
      narrow(scaled(v, scale, bias), writable(y));
    });
    return;
  }
  // `move(to or from y, the box, how many)` for every eight columns of a row.
  auto for_each_group = [&](auto move) {
    for (int e = thread; e < S::kRows * S::kColumnTiles; e += S::kThreads) {
      const int row = e / S::kColumnTiles, group = e % S::kColumnTiles * 8;
      const int64_t token = first_token + row, column = first_column + group;
      if (token >= p.tokens || column >= p.columns) continue;
      const int64_t left = p.columns - column;
      move(p.y + token * p.y_stride[0] + column, box + row * S::kPitch + group,
           left < 8 ? int(left) : 8);
    }
  };
  if (p.add) {  // y comes where the result will be: a thread adds to its own elements
    for_each_group([&](const T* y, T* to, int count) {
      *reinterpret_cast<uint4*>(writable(to, 8, 16)) = load_packet(y, 1, count).bits;
    });
    __syncthreads();
  }
  finish([&](int row, int at, float v, float scale, float bias) {
    T* to = box + row * S::kPitch + at;
    if (p.add) v += widen(*to);
    narrow(scaled(v, scale, bias), to);
  });
  __syncthreads();
  for_each_group([&](T* y, const T* from, int count) {
    if (count == 8)
      *reinterpret_cast<uint4*>(writable(y, 8, 16)) = *reinterpret_cast<const uint4*>(from);
    else
      for (int i = 0; i < count; ++i) *writable(y + i) = from[i];
  });
}

template <class T, class S>
void launch_gemm(const char* name, const Problem<T>& p, void* stream) {
  const int64_t x = (p.tokens + S::kRows - 1) / S::kRows;
  const int64_t y = (p.columns + S::kColumns - 1) / S::kColumns;
  if (x > INT32_MAX || y > 65535)
    throw std::invalid_argument("lora_linear: x: too many tokens or outputs for one launch");
  const auto kernel = gemm_kernel<T, S>;
  allow_shared_memory(kernel, S::kSharedBytes);
  const dim3 grid{unsigned(x), unsigned(y)};
  if (p.dependent)
    launch_dependent(name, kernel, grid, dim3(S::kThreads), S::kSharedBytes, stream, p);
  else
    launch(name, kernel, grid, dim3(S::kThreads), S::kSharedBytes, stream, p);
}

}  // namespace fastlora
