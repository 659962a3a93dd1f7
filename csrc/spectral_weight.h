// W' = W + U diag(relu(s + strength·δ) - s) Vᵀ, and what its backward needs.
#pragma once

#include "cpu/isa.h"
#include "fold.h"
#include "tensor.h"

namespace fastlora {

// relu(s + x) - s without the cancellation: exactly 0 at x = 0, for s >= 0. (constexpr: also for
// GPUs)
template <class A>
constexpr A spectral_coefficient(A s, A x) {
  return x <= -s || s != s ? -s : x;
}

// The layer of the fold whose gate follows from shift (in `gate`) and s, on the device.
struct SpectralLayer : FoldLayer {
  const void* s;  // [rank], like the shift
  const void* strength;
  int64_t s_stride;
};

void launch_spectral_weight(const SpectralLayer& layer, int device, void* stream);

// scaled[o, i] = u[o, i] * coefficient[i]
struct ScaledColumns {
  TensorView scaled;        // [out, rank], contiguous
  TensorView u;             // [out, rank]
  const void* coefficient;  // [rank] float (double beside float64)
};

// sums[i] += sum over o of product[o, i] * u[o, i]
struct SpectralDots {
  TensorView sums;     // [rank] float64
  TensorView product;  // [rows, rank], rows contiguous
  TensorView u;        // [rows, rank]
};

void launch_spectral_dots(const SpectralDots& p, void* stream);

// The Python-facing entries, shapes and dtypes already checked. `spectral_scale` is false where
// every coefficient is 0 (CPU only).
void spectral_weight(TensorView out, TensorView weight, TensorView u, TensorView s, TensorView vh,
                     TensorView shift, TensorView strength);
bool spectral_scale(TensorView scaled, TensorView u, TensorView s, TensorView shift,
                    TensorView strength);
void spectral_dots(TensorView sums, TensorView product, TensorView u);

}  // namespace fastlora

FASTLORA_DECLARE_CPU(scale_columns_loop, const ::fastlora::ScaledColumns& p)
FASTLORA_DECLARE_CPU(spectral_dots_loop, const ::fastlora::SpectralDots& p)
