// What the kernels of a sampler step share: the row of the table, and guidance. Included by .cu
// files only.
#pragma once

#include "elementwise.cuh"
#include "sampler_step.h"

namespace fastlora {

// A column of the table, or NaN where there is no such row: a kernel cannot raise, and wrong
// samples must not look right.
struct TableRow {
  const float* columns;  // null: no such row

  __device__ __forceinline__ TableRow(const SamplerStep& p, int64_t step)
      : columns(step < 0 || step >= p.steps
                    ? nullptr
                    : static_cast<const float*>(p.table) + step * kTableColumns) {}
  __device__ __forceinline__ float operator[](int column) const {
    return columns == nullptr ? __int_as_float(0x7fffffff) : columns[column];
  }
};

// The weights of a sample: weights[j * p.weight_batch].
__device__ __forceinline__ const float* weights_of(const SamplerStep& p, int64_t step,
                                                   int64_t sample) {
  const bool own_step = p.weight_steps > 1 && step >= 0 && step < p.steps;
  return static_cast<const float*>(p.weights) + (own_step ? step * p.n * p.weight_batch : 0) +
         (p.weight_batch > 1 ? sample : 0);
}

// e = sum_j w_j e_j for kWidth elements from `at` on. N: the number of outputs, 0 for any;
// kAtOnce: of how many the loads may be on their way together.
template <class E, int N, int kAtOnce = (N > 0 ? N : 2)>
__device__ __forceinline__ void guide(const SamplerStep& p, const float* w, int64_t at,
                                      bool vectors, int count, float* e) {
  const int n = N > 0 ? N : p.n;
#pragma unroll kAtOnce
  for (int j = 0; j < n; ++j) {
    float e_j[kWidth];
    load(static_cast<const E*>(p.outputs[j]) + at, vectors, count, e_j);
    const float w_j = w[j * p.weight_batch];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) e[i] = j == 0 ? w_j * e_j[i] : __fmaf_rn(w_j, e_j[i], e[i]);
  }
}

// k_x x + k_e e: both kernels have to get the same bits.
__device__ __forceinline__ float predicted(float k_x, float x, float k_e, float e) {
  return __fmaf_rn(k_x, x, k_e * e);
}

}  // namespace fastlora
