// W' = W + U diag(relu(s + strength·δ) - s) Vᵀ for every layer of a model.
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

// The layer of the fold whose gate follows on the device from the shift (in `gate`) and s, both
// without gaps.
struct SpectralLayer : FoldLayer {
  const void* s;  // [rank], like the shift
  const void* strength;
};

// Layers of one device, a launch for each dtype.
void launch_spectral_weights(const SpectralLayer* layers, int64_t count, int device, void* stream);

// scaled[o, i] = u[o, i] * coefficient[i]
struct ScaledColumns {
  TensorView scaled;        // [out, rank], contiguous
  TensorView u;             // [out, rank]
  const void* coefficient;  // [rank] float (double beside float64)
};

// The Python-facing entries, shapes and dtypes already checked. `spectral_scale` is false where
// every coefficient is 0 (CPU only). `check_spectral_results` is what `spectral_weights` checks of
// its results' memory, for layers that are computed otherwise.
void spectral_weights(TensorViews weights, TensorViews us, TensorViews ss, TensorViews vhs,
                      TensorViews shifts, TensorViews strengths, TensorViews outs);
void check_spectral_results(TensorViews weights, TensorViews us, TensorViews ss, TensorViews vhs,
                            TensorViews shifts, TensorViews strengths, TensorViews outs);
bool spectral_scale(TensorView scaled, TensorView u, TensorView s, TensorView shift,
                    TensorView strength);

}  // namespace fastlora

FASTLORA_DECLARE_CPU(scale_columns_loop, const ::fastlora::ScaledColumns& p)
