// The layers of spectral_weights and of spectral_dots as kernel parameters. Included by .cu files
// only.
#pragma once

#include "layer_group.cuh"
#include "spectral_dots.h"
#include "spectral_weight.h"

namespace fastlora {

// A stride that nobody takes may be anything; the host has seen the others.
inline void narrow_strides(const int64_t (&from)[2], int32_t rows, int32_t columns,
                           int32_t (&to)[2]) {
  to[0] = rows > 1 ? int32_t(from[0]) : 0;
  to[1] = columns > 1 ? int32_t(from[1]) : 1;
}

// W' = W + U diag(c) Vᵀ of one layer, in 104 bytes: 303 of them travel with one launch, SD 1.5's
// UNet has 282.
struct DeviceSpectral {
  const void* weight;                 // [out, in]
  void* result;                       // [out, in], the same memory as `weight` or none of it
  const void *u, *vh;                 // [out, rank], [rank, in]
  const float *s, *shift, *strength;  // [rank], [rank] (both without gaps), []
  int32_t weight_stride[2], result_stride[2], u_stride[2], vh_stride[2];  // in elements
  int32_t out, in, rank;
  bool u_wide, vh_wide;  // float32 beside a 16-bit weight

  DeviceSpectral() = default;
  explicit DeviceSpectral(const SpectralLayer& p)
      : weight(p.weight),
        result(p.result),
        u(p.up),
        vh(p.down),
        s(static_cast<const float*>(p.s)),
        shift(static_cast<const float*>(p.gate)),
        strength(static_cast<const float*>(p.strength)),
        out(p.out),
        in(p.in),
        rank(p.rank),
        u_wide(p.up_dtype != p.dtype),
        vh_wide(p.down_dtype != p.dtype) {
    narrow_strides(p.weight_stride, out, in, weight_stride);
    narrow_strides(p.result_stride, out, in, result_stride);
    narrow_strides(p.up_stride, out, rank, u_stride);
    narrow_strides(p.down_stride, rank, in, vh_stride);
  }
};
static_assert(sizeof(DeviceSpectral) == 104 &&
                  (LayerGroup<DeviceSpectral, 32760>::kCapacity == 303),
              "a model's fit into the parameters of one launch");

__device__ __forceinline__ float coefficient(const DeviceSpectral& p, int64_t k) {
  return spectral_coefficient(p.s[k], *p.strength * p.shift[k]);
}

// p_i = u_iᵀ G v_i of one layer. A block writes what its tile's rows contribute into the row of
// `partial` that belongs to them; `sums` are the sums of its columns.
struct DeviceDots {
  const void *grad, *u, *vh;                          // [out, in], [out, rank], [rank, in]
  float *partial, *sums;                              // [parts, rank], [rank]
  int32_t grad_stride[2], u_stride[2], vh_stride[2];  // in elements
  int32_t out, in, rank;
  int32_t parts;         // tiles down
  bool u_wide, vh_wide;  // float32 beside a 16-bit gradient

  DeviceDots() = default;
  explicit DeviceDots(const SpectralDots& p)
      : grad(p.grad),
        u(p.u),
        vh(p.vh),
        partial(nullptr),
        sums(p.sums),
        out(p.out),
        in(p.in),
        rank(p.rank),
        parts(0),
        u_wide(p.u_dtype != p.dtype),
        vh_wide(p.vh_dtype != p.dtype) {
    narrow_strides(p.grad_stride, out, in, grad_stride);
    narrow_strides(p.u_stride, out, rank, u_stride);
    narrow_strides(p.vh_stride, rank, in, vh_stride);
  }
};

}  // namespace fastlora
