// The low-rank linear layer for shapes so small that library calls would cost more than the
// arithmetic. Larger ones go through torch's matrix product (fastlora/ops/lora_linear.py decides).
#include "../lora_linear.h"

#include "scalar.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

template <class A, class T>
static inline A dot(const A* a, const T* b, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * A(load(b + i));
  return sum;
}

template <class T>
void run(const LoraLinear& p) {
  using A = Acc<T>;
  const T* x = p.x.ptr<const T>();
  const T* weight = p.weight.ptr<const T>();
  const T* bias = p.bias.ptr<const T>();
  const T* down = p.down.ptr<const T>();
  const T* up = p.up.ptr<const T>();
  const T* row_scale = p.row_scale.ptr<const T>();
  const A* gate = p.gate.ptr<const A>();
  T* y = p.y.ptr<T>();
  const int64_t in = p.in, out = p.out, rank = p.rank;
  const bool gate_rows = p.gate.ndim == 2;
  const bool has_weight = p.weight.defined, has_down = p.down.defined;
  const bool has_bias = p.bias.defined, has_row_scale = p.row_scale.defined;

  A row[4096];  // this token's x, widened once
  A h[1024];    // this token's gated rank-r activation
  for (int64_t token = 0; token < p.tokens; ++token) {
    const A* g = gate + (gate_rows ? token / p.tokens_per_row * rank : 0);
    for (int64_t k = 0; k < in; ++k) row[k] = A(load(x + token * in + k));
    for (int64_t r = 0; r < rank; ++r)
      h[r] = g[r] * (has_down ? dot(row, down + r * in, in) : row[r]);
    T* y_row = y + token * out;
    for (int64_t n = 0; n < out; ++n) {
      A sum = dot(h, up + n * rank, rank);
      sum += has_weight ? dot(row, weight + n * in, in) : A(load(y_row + n));
      if (has_row_scale) sum *= A(load(row_scale + n));
      if (has_bias) sum += A(load(bias + n));
      store(y_row + n, sum);
    }
  }
}

}  // namespace

void lora_linear_loop(const LoraLinear& p) { FASTLORA_FLOAT_TYPES(p.y.dtype, T, run<T>(p)); }

}  // namespace FASTLORA_ISA
}  // namespace fastlora
