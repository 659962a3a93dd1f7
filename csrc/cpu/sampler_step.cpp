// One step of a solver's table in one pass over memory: chunks that stay in the first-level cache
// go through guidance, update and conversion one after the other.
#include "../sampler_step.h"

#include "../philox.h"
#include "scalar.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

constexpr int64_t kChunk = 1024;  // elements of one sample; a multiple of Philox's 4
constexpr int64_t kElementsPerParallel = 1 << 16;  // fewer than this are faster on one thread

// What the row of the table and the weights say about one sample.
template <class X>
struct Row {
  X k_x, k_e, c_x, c_0, c_e, c_h, c_n, g_x, g_0, g_e, m, clip;
  X w[kMaxOutputs];
};

template <class X>
static inline X element(const void* data, DType dtype, int64_t i) {
  return dtype == DType::kFloat64 ? X(static_cast<const double*>(data)[i])
                                  : X(static_cast<const float*>(data)[i]);
}

template <class X>
static inline Row<X> row_of(const SamplerStep& p, int64_t sample) {
  const int64_t step = *p.step;
  Row<X> r;
  X* const fields[kTableColumns] = {&r.k_x, &r.k_e, &r.c_x, &r.c_0, &r.c_e, &r.c_h,
                                    &r.c_n, &r.g_x, &r.g_0, &r.g_e, &r.m,   &r.clip};
  for (int i = 0; i < kTableColumns; ++i)
    *fields[i] = element<X>(p.table, p.table_dtype, step * kTableColumns + i);
  const int64_t weight_step = p.weight_steps > 1 ? step : 0;
  const int64_t weight_sample = p.weight_batch > 1 ? sample : 0;
  for (int32_t j = 0; j < p.n; ++j)
    r.w[j] = element<X>(p.weights, p.weights_dtype,
                        (weight_step * p.n + j) * p.weight_batch + weight_sample);
  return r;
}

// e = sum_j w_j e_j for `count` elements from `at` on.
template <class X, class E>
static inline void guide(const SamplerStep& p, const Row<X>& r, int64_t at, int64_t count, X* e) {
  const E* e0 = static_cast<const E*>(p.outputs[0]) + at;
  const X w0 = r.w[0];
  if (p.n == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) e[i] = w0 * X(load(e0 + i));
    return;
  }
  const E* e1 = static_cast<const E*>(p.outputs[1]) + at;
  const X w1 = r.w[1];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) e[i] = w0 * X(load(e0 + i)) + w1 * X(load(e1 + i));
  for (int32_t j = 2; j < p.n; ++j) {
    const E* ej = static_cast<const E*>(p.outputs[j]) + at;
    const X wj = r.w[j];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) e[i] += wj * X(load(ej + i));
  }
}

template <class X>
static inline X clipped(X v, X limit) {  // NaN stays NaN
  v = v < -limit ? -limit : v;
  return v > limit ? limit : v;
}

// x' = c_x x + c_0 x0 + c_e e, and h' where there is a history.
template <class X>
static inline void update(const SamplerStep& p, const Row<X>& r, int64_t at, int64_t count,
                          const X* e) {
  const X* x = static_cast<const X*>(p.x) + at;
  X* __restrict x_next = static_cast<X*>(p.x_next) + at;
  const X k_x = r.k_x, k_e = r.k_e, c_x = r.c_x, c_0 = r.c_0, c_e = r.c_e, clip = r.clip;
  if (p.history == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const X x0 = clipped(k_x * x[i] + k_e * e[i], clip);
      x_next[i] = c_x * x[i] + c_0 * x0 + c_e * e[i];
    }
    return;
  }
  const X* h = static_cast<const X*>(p.history) + at;
  X* __restrict h_next = static_cast<X*>(p.history_next) + at;
  const X c_h = r.c_h, g_x = r.g_x, g_0 = r.g_0, g_e = r.g_e;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const X x0 = clipped(k_x * x[i] + k_e * e[i], clip);
    x_next[i] = c_x * x[i] + c_0 * x0 + c_e * e[i] + c_h * h[i];
    h_next[i] = g_x * x[i] + g_0 * x0 + g_e * e[i];
  }
}

// x' += c_n z for the elements first .. first + count - 1 of a sample, `first` a multiple of 4.
template <class X>
static inline void accumulate_noise(X* x_next, X c_n, int64_t seed, int64_t step, int64_t first,
                                    int64_t count, X* z) {
  const int64_t blocks = (count + 3) / 4;
  for (int64_t i = 0; i < blocks; ++i)
    philox::normals(uint64_t(seed), uint64_t(step), uint64_t(first / 4 + i), z + 4 * i);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x_next[i] += c_n * z[i];
}

template <class X, class M>
static inline void write_inputs(const SamplerStep& p, X m, int64_t at, int64_t count) {
  const X* x_next = static_cast<const X*>(p.x_next) + at;
  M* input = static_cast<M*>(p.model_input) + at;
  for (int64_t copy = 0; copy < p.copies; ++copy) {
    M* __restrict out = input + copy * p.batch * p.inner;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(out + i, Acc<M>(m * x_next[i]));
  }
}

template <class X>
static inline void chunk(const SamplerStep& p, const Row<X>& r, int64_t sample, int64_t first,
                         int64_t count) {
  X scratch[kChunk];  // e, then the noise
  const int64_t at = sample * p.inner + first;
  FASTLORA_FLOAT_TYPES(p.output_dtype, E, guide<X, E>(p, r, at, count, scratch));
  update<X>(p, r, at, count, scratch);
  if (p.seeds != nullptr && r.c_n != 0)
    accumulate_noise<X>(static_cast<X*>(p.x_next) + at, r.c_n, p.seeds[sample], *p.step, first,
                        count, scratch);
  FASTLORA_FLOAT_TYPES(p.input_dtype, M, write_inputs<X, M>(p, r.m, at, count));
}

template <class X>
static void run(const SamplerStep& p) {
  const int64_t chunks = (p.inner + kChunk - 1) / kChunk;  // of one sample
  const int64_t total = p.batch * chunks;
#pragma omp parallel if (p.batch * p.inner >= kElementsPerParallel)
  {
    Row<X> row;  // of the sample that this thread is in; of all where they share their weights
    int64_t row_sample = -1;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < total; ++task) {
      const int64_t sample = task / chunks, first = task % chunks * kChunk;
      const int64_t count = p.inner - first < kChunk ? p.inner - first : kChunk;
      if (row_sample < 0 || (p.weight_batch > 1 && sample != row_sample))
        row = row_of<X>(p, sample);
      row_sample = sample;
      chunk<X>(p, row, sample, first, count);
    }
  }
}

}  // namespace

void sampler_step_loop(const SamplerStep& p) {
  if (p.x_dtype == DType::kFloat64)
    run<double>(p);
  else
    run<float>(p);
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
