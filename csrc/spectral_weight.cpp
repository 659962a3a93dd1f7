#include "spectral_weight.h"

namespace fastlora {
namespace {

constexpr const char* kOp = "spectral_weight";

void check_coefficients(const TensorView& like, const TensorView& s, const TensorView& shift,
                        const TensorView& strength) {
  const DType wide = like.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const struct {
    const char* name;
    const TensorView& view;
  } arguments[] = {{"s", s}, {"shift", shift}, {"strength", strength}};
  for (const auto& a : arguments) {
    check_memory(kOp, a.name, a.view, like);
    FASTLORA_CHECK(a.view.dtype == wide, kOp, a.name, name_of(wide), a.view);
  }
}

// A CPU tensor's coefficients, in its arithmetic.
template <class A>
std::vector<A> coefficients(const TensorView& s, const TensorView& shift,
                            const TensorView& strength) {
  std::vector<A> c(s.shape[0]);
  const A a = *strength.ptr<const A>();
  for (size_t i = 0; i < c.size(); ++i)
    c[i] = spectral_coefficient(s.ptr<const A>()[i * s.strides[0]],
                                a * shift.ptr<const A>()[i * shift.strides[0]]);
  return c;
}

template <class A>
bool any(const std::vector<A>& c) {
  for (const A v : c)
    if (v != 0) return true;
  return false;
}

template <class A>
void on_cpu(FoldLayer layer, const std::vector<A>& c) {
  layer.gate = c.data();
  layer.gate_stride = 1;
  fold_on_cpu(&layer, 1);
}

template <class A>
bool scale(const TensorView& scaled, const TensorView& u, const std::vector<A>& c) {
  if (!any(c)) return false;
  const ScaledColumns p{scaled, u, c.data()};
  const WithoutGil others_may_run;
  FASTLORA_CPU_CALL(scale_columns_loop, p);
  return true;
}

}  // namespace

void spectral_weight(TensorView out, TensorView weight, TensorView u, TensorView s, TensorView vh,
                     TensorView shift, TensorView strength) {
  check_memory(kOp, "weight", weight, out);
  check_memory(kOp, "u", u, out);
  check_memory(kOp, "vh", vh, out);
  check_coefficients(out, s, shift, strength);
  const FoldLayer layer = fold_layer(kOp, weight, vh, u, shift, out);
  if (out.numel() == 0) return;
  if (!out.cpu()) {
#ifdef FASTLORA_CUDA
    const SpectralLayer spectral{layer, s.data, strength.data, s.strides[0]};
    launch_spectral_weight(spectral, out.device.device_id, current_stream(out));
#else
    FASTLORA_CHECK(false, kOp, "weight", "a CPU tensor (this build has no CUDA kernels)", out);
#endif
    return;
  }
  if (out.dtype == DType::kFloat64)
    on_cpu(layer, coefficients<double>(s, shift, strength));
  else
    on_cpu(layer, coefficients<float>(s, shift, strength));
}

bool spectral_scale(TensorView scaled, TensorView u, TensorView s, TensorView shift,
                    TensorView strength) {
  check_memory(kOp, "u", u, scaled);
  check_coefficients(scaled, s, shift, strength);
  check_contiguous(kOp, "scaled", scaled);
  FASTLORA_CHECK(scaled.cpu(), kOp, "scaled", "a CPU tensor", scaled);
  FASTLORA_CHECK(u.dtype == scaled.dtype, kOp, "u", name_of(scaled.dtype), u);
  if (scaled.dtype == DType::kFloat64)
    return scale(scaled, u, coefficients<double>(s, shift, strength));
  return scale(scaled, u, coefficients<float>(s, shift, strength));
}

void spectral_dots(TensorView sums, TensorView product, TensorView u) {
  constexpr const char* kDots = "spectral_dots";
  check_memory(kDots, "product", product, sums);
  check_memory(kDots, "u", u, sums);
  check_contiguous(kDots, "sums", sums);
  FASTLORA_CHECK(sums.dtype == DType::kFloat64, kDots, "sums", "float64", sums);
  FASTLORA_CHECK(product.shape[0] <= 1 || product.shape[1] <= 1 || product.strides[1] == 1, kDots,
                 "product", "contiguous rows", product);
  FASTLORA_CHECK(u.dtype == product.dtype, kDots, "u", name_of(product.dtype), u);
  const SpectralDots p{sums, product, u};
  if (product.numel() == 0) return;
  if (sums.cpu()) {
    const WithoutGil others_may_run;
    FASTLORA_CPU_CALL(spectral_dots_loop, p);
    return;
  }
#ifdef FASTLORA_CUDA
  launch_spectral_dots(p, current_stream(sums));
#else
  FASTLORA_CHECK(false, kDots, "product", "a CPU tensor (this build has no CUDA kernels)", product);
#endif
}

}  // namespace fastlora
