// The fold whose coefficients follow from singular values and their shift, and the dots of its
// backward.
#include "rank_update.cuh"
#include "spectral_weight.h"

namespace fastlora {

struct DeviceSpectral : DeviceLayer {
  const void *s, *strength;
  int64_t s_stride;

  DeviceSpectral() = default;
  explicit DeviceSpectral(const SpectralLayer& p)
      : DeviceLayer(p), s(p.s), strength(p.strength), s_stride(p.s_stride) {}
};

__device__ __forceinline__ float coefficient(const DeviceSpectral& p, int64_t k) {
  const float shift = static_cast<const float*>(p.gate)[k * p.gate_stride];
  const float s = static_cast<const float*>(p.s)[k * p.s_stride];
  return spectral_coefficient(s, *static_cast<const float*>(p.strength) * shift);
}

namespace {

constexpr int kDotColumns = 32, kDotRows = 16;  // of one block

struct Dots {
  const void *product, *u;
  double* sums;
  int64_t rows, rank;
  int64_t product_stride, u_stride[2];
};

// One warp's lanes lie along the columns; the block's warps share the rows.
template <class T>
__global__ void __launch_bounds__(kDotColumns* kDotRows) spectral_dots_kernel(Dots p) {
  FASTLORA_SHARED(partial, double[kDotRows][kDotColumns]);
  const int lane = int(threadIdx.x), slice = int(threadIdx.y);
  const int64_t column = int64_t(blockIdx.x) * kDotColumns + lane;
  double sum = 0;
  if (column < p.rank)
    for (int64_t row = slice; row < p.rows; row += kDotRows)
      sum +=
          double(widen(static_cast<const T*>(p.product)[row * p.product_stride + column]) *
                 widen(static_cast<const T*>(p.u)[row * p.u_stride[0] + column * p.u_stride[1]]));
  partial[slice][lane] = sum;
  __syncthreads();
  if (slice != 0 || column >= p.rank) return;
  for (int i = 1; i < kDotRows; ++i) sum += partial[i][lane];  // always in this order
  p.sums[column] += sum;
}

}  // namespace

void launch_spectral_weight(const SpectralLayer& layer, int device, void* stream) {
  const DeviceGuard guard(device);
  launch_rank_update(std::vector<DeviceSpectral>{DeviceSpectral(layer)}, layer.dtype, stream);
}

void launch_spectral_dots(const SpectralDots& v, void* stream) {
  const DeviceGuard guard(v.sums.device.device_id);
  Dots p{};
  p.product = v.product.data;
  p.u = v.u.data;
  p.sums = v.sums.ptr<double>();
  p.rows = v.product.shape[0];
  p.rank = v.product.shape[1];
  p.product_stride = v.product.strides[0];
  p.u_stride[0] = v.u.strides[0];
  p.u_stride[1] = v.u.strides[1];
  const auto kernel = v.product.dtype == DType::kFloat16    ? spectral_dots_kernel<__half>
                      : v.product.dtype == DType::kBFloat16 ? spectral_dots_kernel<__nv_bfloat16>
                                                            : spectral_dots_kernel<float>;
  const int64_t blocks = (p.rank + kDotColumns - 1) / kDotColumns;
  launch("spectral_dots", kernel, dim3(unsigned(blocks)), dim3(kDotColumns, kDotRows), 0, stream,
         p);
}

}  // namespace fastlora
