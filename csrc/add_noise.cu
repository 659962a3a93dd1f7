// The noisy sample and its target: x0 (and the noise) read once, both results written once.
#include "add_noise.h"
#include "elementwise.cuh"
#include "launch.h"
#include "philox.h"

namespace fastlora {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) add_noise_kernel(AddNoise p, bool vectors) {
  const int64_t groups = (p.inner + kWidth - 1) / kWidth;
  for (int64_t sample = blockIdx.y; sample < p.batch; sample += gridDim.y) {
    // A t outside the table gives NaN: a kernel cannot raise, and wrong samples must not look
    // right.
    const int64_t t = p.t[sample];
    const bool listed = t >= 0 && t < p.steps;
    const float nan = __int_as_float(0x7fffffff);
    const float* row = static_cast<const float*>(p.table) + (listed ? t * 4 : 0);
    const float alpha = listed ? row[0] : nan, sigma = row[1];
    const float p_0 = listed ? row[2] : nan, p_e = row[3];
    for (int64_t group = int64_t(blockIdx.x) * kThreads + threadIdx.x; group < groups;
         group += int64_t(gridDim.x) * kThreads) {
      const int64_t first = group * kWidth, at = sample * p.inner + first;
      const int count = p.inner - first < kWidth ? int(p.inner - first) : kWidth;
      float clean[kWidth], eps[kWidth], x_t[kWidth], target[kWidth];
      load(static_cast<const T*>(p.x0) + at, vectors, count, clean);
      if (p.noise != nullptr) {
        load(static_cast<const T*>(p.noise) + at, vectors, count, eps);
      } else {
#pragma unroll
        for (int k = 0; k < kWidth; k += 4)
          philox::normals(uint64_t(p.seeds[sample]), uint64_t(philox::kStart),
                          uint64_t((first + k) / 4), eps + k);
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        x_t[i] = alpha * clean[i] + sigma * eps[i];
        target[i] = p_0 * clean[i] + p_e * eps[i];
      }
      store(static_cast<T*>(p.x_t) + at, vectors, count, x_t);
      store(static_cast<T*>(p.target) + at, vectors, count, target);
    }
  }
}

}  // namespace

void launch_add_noise(const AddNoise& p, int device, void* stream) {
  const DeviceGuard guard(device);
  const bool vectors = p.inner % kWidth == 0 && aligned16(p.x0) && aligned16(p.noise) &&
                       aligned16(p.x_t) && aligned16(p.target);
  const auto kernel = p.dtype == DType::kFloat16    ? add_noise_kernel<__half>
                      : p.dtype == DType::kBFloat16 ? add_noise_kernel<__nv_bfloat16>
                                                    : add_noise_kernel<float>;
  launch("add_noise", kernel, elementwise_grid(p.batch, p.inner), dim3(kThreads), 0, stream, p,
         vectors);
}

}  // namespace fastlora
