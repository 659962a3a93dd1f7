// The layers of spectral_weights and of spectral_dots as kernel parameters. Included by .cu files
// only.
#pragma once

#include "layer_group.cuh"
#include "spectral_weight.h"

namespace fastlora {

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
};
static_assert(sizeof(DeviceSpectral) == 104 &&
                  LayerGroup<DeviceSpectral, kLargeParameterBytes>::kCapacity >=
                      (kLargeParameterBytes > kParameterBytes ? 303 : 37),
              "a model's fit into the parameters of one launch");

__device__ __forceinline__ float coefficient(const DeviceSpectral& p, int64_t k) {
  return spectral_coefficient(p.s[k], *p.strength * p.shift[k]);
}

// p_i = u_iᵀ G v_i of one layer. A block writes what its tile's rows contribute to the row of
// `partial` that belongs to them; sums are the columns' sums of that.
struct DeviceDots {
  const void *grad, *u, *vh;                          // [out, in], [out, rank], [rank, in]
  float* partial;                                     // [tiles_down, rank]
  float* sums;                                        // [rank]
  int32_t grad_stride[2], u_stride[2], vh_stride[2];  // in elements
  int32_t out, in, rank;
  bool u_wide, vh_wide;  // float32 beside a 16-bit gradient
};

}  // namespace fastlora
