// One step of a solver's table: every tensor is read or written once. The step index is read here,
// on the device, so that a whole sampling loop can be one CUDA graph.
#include "launch.h"
#include "philox.h"
#include "sampler_row.cuh"

namespace fastlora {
namespace {

__device__ __forceinline__ float clipped(float v, float limit) {  // NaN stays NaN
  v = v < -limit ? -limit : v;
  return v > limit ? limit : v;
}

// kWidth elements of a tensor of float32, or of noise.
struct Group {
  int64_t sample, first, at;  // the first element within its sample, and within the batch
  int count;
  bool vectors;

  __device__ __forceinline__ void read(const void* from, int64_t offset, float* to) const {
    load(static_cast<const float*>(from) + offset, vectors, count, to);
  }
  __device__ __forceinline__ void normals(int64_t seed, int64_t step, float* z) const {
#pragma unroll
    for (int k = 0; k < kWidth; k += 4)
      philox::normals(uint64_t(seed), uint64_t(step), uint64_t((first + k) / 4), z + k);
  }
};

// c_x x + c_0 x0 + c_e e + c_h h + c_r r, the columns from `c` on.
__device__ __forceinline__ void combine(const SamplerStep& p, const TableRow& r, int c,
                                        const float* x, const float* x0, const float* e,
                                        const float* h, const float* q, float* out) {
  const float c_x = r[c], c_0 = r[c + 1], c_e = r[c + 2];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out[i] = c_x * x[i] + c_0 * x0[i] + c_e * e[i];
  if (p.histories > 0) {
    const float c_h = r[c + 3];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[i] += c_h * h[i];
  }
  if (p.histories > 1) {
    const float c_r = r[c + 4];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[i] += c_r * q[i];
  }
}

// The mask of a group: 16-byte accesses where its memory is laid out as the group's.
__device__ __forceinline__ void read_mask(const SamplerStep& p, const Group& g, float* mask) {
  const float* from =
      static_cast<const float*>(p.mask) + (p.mask_batch > 1 ? g.sample * p.mask_period : 0);
  if (p.mask_period == p.inner || p.mask_period % kWidth == 0) {
    const float* here = from + (p.mask_period == p.inner ? g.first : g.first % p.mask_period);
    load(here, g.vectors && p.mask_period % kWidth == 0 && aligned16(p.mask), g.count, mask);
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    mask[i] = i < g.count ? *readable(from + (g.first + i) % p.mask_period) : 0.0f;
}

// x' = mask x' + (1 - mask)(p_0 known + p_e z0).
__device__ __forceinline__ void mix_known(const SamplerStep& p, const TableRow& r, const Group& g,
                                          float* x_next) {
  float mask[kWidth], known[kWidth];
  read_mask(p, g, mask);
  g.read(p.known, g.at, known);
  const float p_0 = r[kP0], p_e = r[kPe];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) known[i] *= p_0;
  if (p_e != 0.0f) {
    float z[kWidth];
    g.normals(p.seeds[g.sample], philox::kStart, z);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) known[i] += p_e * z[i];
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x_next[i] = mask[i] * x_next[i] + (1 - mask[i]) * known[i];
}

// Everything that the plain step does not have: history, noise, mask, dynamic thresholding. `e` has
// been rescaled; x_next gets x'.
__device__ __forceinline__ void with_options(const SamplerStep& p, const TableRow& r, int64_t step,
                                             const Group& g, const float* x, const float* e,
                                             float* x_next) {
  const int64_t all = p.batch * p.inner;
  float h[kWidth] = {}, q[kWidth] = {}, x0[kWidth];
  if (p.histories > 0) g.read(p.history, g.at, h);
  if (p.histories > 1) g.read(p.history, g.at + all, q);
  const float k_x = r[kKx], k_e = r[kKe];
  const float limit =
      p.dynamic ? static_cast<const float*>(p.statistics)[2 * g.sample + 1] : r[kClip];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    x0[i] = clipped(predicted(k_x, x[i], k_e, e[i]), limit);
    if (p.dynamic) x0[i] /= limit;
  }
  for (int k = 0; k < p.histories; ++k) {
    combine(p, r, k == 0 ? kGx : kRx, x, x0, e, h, q, x_next);
    store(static_cast<float*>(p.history_next) + k * all + g.at, g.vectors, g.count, x_next);
  }
  combine(p, r, kCx, x, x0, e, h, q, x_next);
  const float c_n = r[kCn];
  if (c_n != 0.0f && (p.seeds != nullptr || p.noise != nullptr)) {
    float z[kWidth];
    if (p.noise != nullptr)
      g.read(p.noise, g.at, z);
    else
      g.normals(p.seeds[g.sample], step, z);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x_next[i] += c_n * z[i];
  }
  if (p.mask != nullptr) mix_known(p, r, g, x_next);
}

template <class M>
__device__ __forceinline__ void write_inputs(const SamplerStep& p, const Group& g,
                                             const float* input) {
  for (int64_t copy = 0; copy < p.copies; ++copy)
    store(static_cast<M*>(p.model_input) + copy * p.batch * p.inner + g.at, g.vectors, g.count,
          input);
}

// T: the type of x, E: that of the model outputs; N: their number, 0 for any; Plain: guidance,
// clipping and the sum of x, x0 and e alone.
template <class T, class E, int N, bool Plain>
__global__ void __launch_bounds__(kThreads, 2) sampler_step_kernel(SamplerStep p, bool vectors) {
  const int64_t step = *p.step;
  const TableRow r(p, step);
  const int64_t groups = (p.inner + kWidth - 1) / kWidth;
  for (int64_t sample = blockIdx.y; sample < p.batch; sample += gridDim.y) {
    const float* w = weights_of(p, step, sample);
    for (int64_t group = int64_t(blockIdx.x) * kThreads + threadIdx.x; group < groups;
         group += int64_t(gridDim.x) * kThreads) {
      const int64_t first = group * kWidth, at = sample * p.inner + first;
      const int count = p.inner - first < kWidth ? int(p.inner - first) : kWidth;
      const Group g{sample, first, at, count, vectors};

      float x[kWidth], e[kWidth], x_next[kWidth];
      load(static_cast<const T*>(p.x) + at, vectors, count, x);
      guide<E, N>(p, w, at, vectors, count, e);
      if constexpr (Plain) {
        const float k_x = r[kKx], k_e = r[kKe], c_x = r[kCx], c_0 = r[kC0], c_e = r[kCe];
        const float clip = r[kClip];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float x0 = clipped(predicted(k_x, x[i], k_e, e[i]), clip);
          x_next[i] = c_x * x[i] + c_0 * x0 + c_e * e[i];
        }
      } else {
        if (p.rescale != nullptr) {
          const float factor = static_cast<const float*>(p.statistics)[2 * sample];
#pragma unroll
          for (int i = 0; i < kWidth; ++i) e[i] *= factor;
        }
        with_options(p, r, step, g, x, e, x_next);
      }
      store(static_cast<T*>(p.x_next) + at, vectors, count, x_next);
      const float m = r[kM];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x_next[i] *= m;
      if (p.input_dtype == DType::kFloat32)
        write_inputs<float>(p, g, x_next);
      else if (p.input_dtype == DType::kFloat16)
        write_inputs<__half>(p, g, x_next);
      else
        write_inputs<__nv_bfloat16>(p, g, x_next);
    }
  }
}

template <class T, class E>
void launch_typed(const SamplerStep& p, bool vectors, void* stream) {
  const bool plain = p.histories == 0 && p.seeds == nullptr && p.noise == nullptr &&
                     p.mask == nullptr && !p.reduces();
  const auto kernel = !plain     ? sampler_step_kernel<T, E, 0, false>
                      : p.n == 1 ? sampler_step_kernel<T, E, 1, true>
                      : p.n == 2 ? sampler_step_kernel<T, E, 2, true>
                                 : sampler_step_kernel<T, E, 0, true>;
  launch("sampler_step", kernel, elementwise_grid(p.batch, p.inner), dim3(kThreads), 0, stream, p,
         vectors);
}

template <class T>
void launch_outputs(const SamplerStep& p, bool vectors, void* stream) {
  if (p.output_dtype == DType::kFloat32) launch_typed<T, float>(p, vectors, stream);
  if (p.output_dtype == DType::kFloat16) launch_typed<T, __half>(p, vectors, stream);
  if (p.output_dtype == DType::kBFloat16) launch_typed<T, __nv_bfloat16>(p, vectors, stream);
}

}  // namespace

void launch_sampler_step(const SamplerStep& p, int device, void* stream) {
  const DeviceGuard guard(device);
  bool vectors = p.inner % kWidth == 0 && aligned16(p.x) && aligned16(p.history) &&
                 aligned16(p.noise) && aligned16(p.known) && aligned16(p.x_next) &&
                 aligned16(p.history_next) && aligned16(p.model_input);
  for (int j = 0; j < p.n; ++j) vectors = vectors && aligned16(p.outputs[j]);
  if (p.x_dtype == DType::kFloat32) launch_outputs<float>(p, vectors, stream);
  if (p.x_dtype == DType::kFloat16) launch_outputs<__half>(p, vectors, stream);
  if (p.x_dtype == DType::kBFloat16) launch_outputs<__nv_bfloat16>(p, vectors, stream);
}

}  // namespace fastlora
