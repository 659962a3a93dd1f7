// The tile of W += F·D that the CPU loops share: kRows x kColumns elements whose low-rank part is
// summed in registers and added to W once. F and D are packed in the order in which the tiles read
// them.
#pragma once

#include <cstdint>

#include "scalar.h"
#include "vector.h"

namespace fastlora {
namespace FASTLORA_ISA {

// kRows x kVectors accumulators, kVectors operands and one factor must fit the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 6;
#endif
constexpr int kVectors = 2;

constexpr int64_t kLine = 64;  // bytes of a cache line

template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));
template <class A>
constexpr int kColumns = kVectors * kLanes<A>;

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The distance of a packed matrix' rows: an odd number of cache lines, so that they spread over the
// sets of the caches.
template <class A>
static inline int64_t odd_pitch(int64_t columns) {
  constexpr int64_t line = kLine / sizeof(A);
  return (round_up(columns, line) / line | 1) * line;
}

// sum = the low-rank part of one tile, of so few components that rounding does not add up.
template <class A>
static inline __attribute__((always_inline)) void multiply_few(const A* factors, const A* down,
                                                               int64_t pitch, int32_t count,
                                                               Vector<A> (&sum)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[m][v] = Vector<A>{};
  for (int32_t k = 0; k < count; ++k, factors += kRows, down += pitch) {
    Vector<A> d[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) d[v] = load_vector(down + v * kLanes<A>);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[m][v] += factors[m] * d[v];
  }
}

constexpr int32_t kChain = 128;  // components that are summed one after the other

// sum = the low-rank part of one tile.
template <class A>
static inline __attribute__((always_inline)) void multiply(const A* factors, const A* down,
                                                           int64_t pitch, int32_t count,
                                                           Vector<A> (&sum)[kRows][kVectors]) {
  multiply_few<A>(factors, down, pitch, count < kChain ? count : kChain, sum);
  for (int32_t k = kChain; k < count; k += kChain) {
    Vector<A> more[kRows][kVectors];
    multiply_few<A>(factors + k * kRows, down + k * pitch, pitch,
                    count - k < kChain ? count - k : kChain, more);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[m][v] += more[m][v];
  }
}

// W + sum for a whole tile of unit column strides. `streaming`: `out` is aligned to whole
// registers.
template <class A>
static inline __attribute__((always_inline)) void add_tile(const A* w, int64_t w_stride,
                                                           const Vector<A> (&sum)[kRows][kVectors],
                                                           A* out, int64_t out_stride,
                                                           bool streaming) {
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m, w += w_stride, out += out_stride)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Vector<A> result = load_vector(w + v * kLanes<A>) + sum[m][v];
      if (streaming)
        stream(out + v * kLanes<A>, &result);
      else
        store_vector(out + v * kLanes<A>, result);
    }
}

template <class A>
static inline __attribute__((always_inline)) void spill(const Vector<A> (&sum)[kRows][kVectors],
                                                        A (&line)[kRows][kColumns<A>]) {
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store_vector(&line[m][v * kLanes<A>], sum[m][v]);
}

// The same with a rounding to sixteen bits.
template <class T>
static __attribute__((noinline)) void add_rounded(const T* w, int64_t w_stride, float* sum, T* out,
                                                  int64_t out_stride, bool streaming) {
  constexpr int width = kColumns<float>;
  for (int m = 0; m < kRows; ++m, w += w_stride, sum += width, out += out_stride) {
    T line[width];
#pragma omp simd
    for (int j = 0; j < width; ++j) sum[j] += load(w + j);
#pragma omp simd
    for (int j = 0; j < width; ++j) store((streaming ? line : out) + j, sum[j]);
    if (streaming)
      for (int b = 0; b < int(sizeof line); b += kVectorBytes)
        stream(reinterpret_cast<char*>(out) + b, reinterpret_cast<char*>(line) + b);
  }
}

// Asks for the weights of the tile after the next: the caches' own prediction loses track of eight
// rows between the operands.
template <class T>
static inline void prefetch(const T* w, int64_t w_stride) {
  constexpr int64_t bytes = kColumns<Acc<T>> * sizeof(T);
  for (int m = 0; m < kRows; ++m)
    for (int64_t b = 2 * bytes; b < 3 * bytes; b += kLine)
      __builtin_prefetch(reinterpret_cast<const char*>(w + m * w_stride) + b);
}

template <class T>
struct Matrix {
  T* data;
  int64_t row_stride, column_stride;
};

// The packed operands of a row of tiles: F as [count][kRows], D as [count][pitch] with whole tiles.
template <class A>
struct Factors {
  const A *f, *d;
  int64_t pitch;
  int32_t count;
};

// out = w + F·D for `rows` (at most kRows) rows. w and out may be the same memory.
template <class T>
static void tiles(const Factors<Acc<T>>& p, const Matrix<const T>& w, const Matrix<T>& out,
                  int64_t rows, int64_t columns, bool streaming) {
  using A = Acc<T>;
  constexpr int width = kColumns<A>;
  int64_t column = 0;
  if (rows == kRows && w.column_stride == 1 && out.column_stride == 1) {
    streaming = streaming && width * sizeof(T) % kLine == 0 &&
                reinterpret_cast<uintptr_t>(out.data) % kVectorBytes == 0 &&
                out.row_stride * sizeof(T) % kVectorBytes == 0;
    for (; columns - column >= width; column += width) {
      Vector<A> sum[kRows][kVectors];
      prefetch<T>(w.data + column, w.row_stride);
      multiply<A>(p.f, p.d + column, p.pitch, p.count, sum);
      if constexpr (sizeof(T) == sizeof(A)) {
        add_tile<T>(w.data + column, w.row_stride, sum, out.data + column, out.row_stride,
                    streaming);
      } else {
        A line[kRows][width];
        spill<A>(sum, line);
        add_rounded<T>(w.data + column, w.row_stride, line[0], out.data + column, out.row_stride,
                       streaming);
      }
    }
  }
  for (; column < columns; column += width) {  // edges, and elements that are not adjacent
    const int64_t valid = columns - column < width ? columns - column : width;
    Vector<A> sum[kRows][kVectors];
    A line[kRows][width];
    multiply<A>(p.f, p.d + column, p.pitch, p.count, sum);
    spill<A>(sum, line);
    for (int64_t m = 0; m < rows; ++m) {
      const T* from = w.data + m * w.row_stride + column * w.column_stride;
      T* to = out.data + m * out.row_stride + column * out.column_stride;
      for (int64_t j = 0; j < valid; ++j)
        store(to + j * out.column_stride, load(from + j * w.column_stride) + line[m][j]);
    }
  }
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
