// What the CPU's loops over a sampler step share: the row of the table, and guidance.
#pragma once

#include "../sampler_step.h"
#include "scalar.h"

namespace fastlora {
namespace FASTLORA_ISA {

constexpr int64_t kChunk = kSamplerChunk;          // of one sample; a multiple of Philox's 4
constexpr int64_t kElementsPerParallel = 1 << 16;  // fewer than this are faster on one thread

// What the row of the table and the weights say about one sample.
template <class X>
struct Row {
  X c[kTableColumns];
  X w[kMaxOutputs];
};

// Element i of a tensor of float32 or float64.
template <class X>
static inline X element(const void* data, DType dtype, int64_t i) {
  return dtype == DType::kFloat64 ? X(static_cast<const double*>(data)[i])
                                  : X(static_cast<const float*>(data)[i]);
}

template <class X>
static inline Row<X> row_of(const SamplerStep& p, int64_t sample) {
  const int64_t step = *p.step;
  Row<X> r;
  for (int i = 0; i < kTableColumns; ++i)
    r.c[i] = element<X>(p.table, p.table_dtype, step * kTableColumns + i);
  const int64_t weight_step = p.weight_steps > 1 ? step : 0;
  const int64_t weight_sample = p.weight_batch > 1 ? sample : 0;
  for (int32_t j = 0; j < p.n; ++j)
    r.w[j] = element<X>(p.weights, p.weights_dtype,
                        (weight_step * p.n + j) * p.weight_batch + weight_sample);
  return r;
}

// e = sum_j w_j e_j for `count` elements from `at` on.
template <class X, class E>
static inline void guide(const SamplerStep& p, const X* w, int64_t at, int64_t count,
                         X* __restrict e) {
  const E* e0 = static_cast<const E*>(p.outputs[0]) + at;
  const X w0 = w[0];
  if (p.n == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) e[i] = w0 * X(load(e0 + i));
    return;
  }
  const E* e1 = static_cast<const E*>(p.outputs[1]) + at;
  const X w1 = w[1];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) e[i] = w0 * X(load(e0 + i)) + w1 * X(load(e1 + i));
  for (int32_t j = 2; j < p.n; ++j) {
    const E* ej = static_cast<const E*>(p.outputs[j]) + at;
    const X wj = w[j];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) e[i] += wj * X(load(ej + i));
  }
}

// The same by the outputs' type, times what the rescaling of guidance asks for.
template <class X>
static inline void guided(const SamplerStep& p, const X* w, int64_t sample, int64_t at,
                          int64_t count, bool rescale, X* __restrict e) {
  FASTLORA_FLOAT_TYPES(p.output_dtype, E, guide<X, E>(p, w, at, count, e));
  if (!rescale) return;
  const X factor = static_cast<const X*>(p.statistics)[2 * sample];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) e[i] *= factor;
}

// x in the type of the arithmetic: itself, or what `room` gets.
template <class X>
static inline const X* widened(const X* x, int64_t, X*) {
  return x;
}
template <class T, class X>
static inline const X* widened(const T* x, int64_t count, X* __restrict room) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) room[i] = load(x + i);
  return room;
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
