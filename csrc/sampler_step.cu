// One step of a solver's table: every tensor is read or written once. The step index is read here,
// on the device, so that a whole sampling loop can be one CUDA graph.
#include "elementwise.cuh"
#include "launch.h"
#include "philox.h"
#include "sampler_step.h"

namespace fastlora {
namespace {

// What the row of the table says; NaN in every column where there is no such row, because a kernel
// cannot raise and wrong samples must not look right.
struct Row {
  float k_x, k_e, c_x, c_0, c_e, c_h, c_n, g_x, g_0, g_e, m, clip;
};

__device__ __forceinline__ Row row_of(const SamplerStep& p, int64_t step) {
  const float* t = static_cast<const float*>(p.table) + step * kTableColumns;
  if (step < 0 || step >= p.steps) {
    const float nan = __int_as_float(0x7fffffff);
    return {nan, nan, nan, nan, nan, nan, nan, nan, nan, nan, nan, nan};
  }
  return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10], t[11]};
}

__device__ __forceinline__ float clipped(float v, float limit) {  // NaN stays NaN
  v = v < -limit ? -limit : v;
  return v > limit ? limit : v;
}

// N: the number of model outputs, 0 for any; E: their type, M: that of the model input.
template <class E, class M, int N>
__global__ void __launch_bounds__(kThreads, 2) sampler_step_kernel(SamplerStep p, bool vectors) {
  const int64_t step = *p.step;
  const Row r = row_of(p, step);
  const int n = N > 0 ? N : p.n;
  const int64_t groups = (p.inner + kWidth - 1) / kWidth;
  for (int64_t sample = blockIdx.y; sample < p.batch; sample += gridDim.y) {
    // this sample's weights: w[j * p.weight_batch]
    const bool own_step = p.weight_steps > 1 && step >= 0 && step < p.steps;
    const float* w = static_cast<const float*>(p.weights) +
                     (own_step ? step * p.n * p.weight_batch : 0) +
                     (p.weight_batch > 1 ? sample : 0);
    for (int64_t group = int64_t(blockIdx.x) * kThreads + threadIdx.x; group < groups;
         group += int64_t(gridDim.x) * kThreads) {
      const int64_t first = group * kWidth, at = sample * p.inner + first;
      const int count = p.inner - first < kWidth ? int(p.inner - first) : kWidth;

      float x[kWidth], e[kWidth], h[kWidth];
      load(static_cast<const float*>(p.x) + at, vectors, count, x);
      if (p.history != nullptr) load(static_cast<const float*>(p.history) + at, vectors, count, h);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        float e_j[kWidth];
        load(static_cast<const E*>(p.outputs[j]) + at, vectors, count, e_j);
        const float w_j = w[j * p.weight_batch];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) e[i] = j == 0 ? w_j * e_j[i] : e[i] + w_j * e_j[i];
      }

      float x_next[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float x0 = clipped(r.k_x * x[i] + r.k_e * e[i], r.clip);
        x_next[i] = r.c_x * x[i] + r.c_0 * x0 + r.c_e * e[i];
        if (p.history != nullptr) {
          x_next[i] += r.c_h * h[i];
          h[i] = r.g_x * x[i] + r.g_0 * x0 + r.g_e * e[i];
        }
      }
      if (p.seeds != nullptr && r.c_n != 0.0f) {
        float z[kWidth];
#pragma unroll
        for (int k = 0; k < kWidth; k += 4)
          philox::normals(uint64_t(p.seeds[sample]), uint64_t(step), uint64_t((first + k) / 4),
                          z + k);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) x_next[i] += r.c_n * z[i];
      }
      store(static_cast<float*>(p.x_next) + at, vectors, count, x_next);
      if (p.history != nullptr) store(static_cast<float*>(p.history_next) + at, vectors, count, h);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x_next[i] *= r.m;
      for (int64_t copy = 0; copy < p.copies; ++copy)
        store(static_cast<M*>(p.model_input) + copy * p.batch * p.inner + at, vectors, count,
              x_next);
    }
  }
}

template <class E, class M>
void launch_typed(const SamplerStep& p, bool vectors, void* stream) {
  const auto kernel = p.n == 1   ? sampler_step_kernel<E, M, 1>
                      : p.n == 2 ? sampler_step_kernel<E, M, 2>
                                 : sampler_step_kernel<E, M, 0>;
  launch("sampler_step", kernel, elementwise_grid(p.batch, p.inner), dim3(kThreads), 0, stream, p,
         vectors);
}

template <class E>
void launch_outputs(const SamplerStep& p, bool vectors, void* stream) {
  if (p.input_dtype == DType::kFloat32) launch_typed<E, float>(p, vectors, stream);
  if (p.input_dtype == DType::kFloat16) launch_typed<E, __half>(p, vectors, stream);
  if (p.input_dtype == DType::kBFloat16) launch_typed<E, __nv_bfloat16>(p, vectors, stream);
}

}  // namespace

void launch_sampler_step(const SamplerStep& p, int device, void* stream) {
  const DeviceGuard guard(device);
  bool vectors = p.inner % kWidth == 0 && aligned16(p.x) && aligned16(p.history) &&
                 aligned16(p.x_next) && aligned16(p.history_next) && aligned16(p.model_input);
  for (int j = 0; j < p.n; ++j) vectors = vectors && aligned16(p.outputs[j]);
  if (p.output_dtype == DType::kFloat32) launch_outputs<float>(p, vectors, stream);
  if (p.output_dtype == DType::kFloat16) launch_outputs<__half>(p, vectors, stream);
  if (p.output_dtype == DType::kBFloat16) launch_outputs<__nv_bfloat16>(p, vectors, stream);
}

}  // namespace fastlora
