#include "spectral_weight.h"

#include <deque>

#include "layer_lists.h"

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
    check_contiguous(kOp, a.name, a.view);
  }
}

// A CPU tensor's coefficients, in its arithmetic.
template <class A>
std::vector<A> coefficients(const TensorView& s, const TensorView& shift,
                            const TensorView& strength) {
  std::vector<A> c(s.shape[0]);
  const A a = *strength.ptr<const A>();
  for (size_t i = 0; i < c.size(); ++i)
    c[i] = spectral_coefficient(s.ptr<const A>()[i], a * shift.ptr<const A>()[i]);
  return c;
}

template <class A>
bool any(const std::vector<A>& c) {
  for (const A v : c)
    if (v != 0) return true;
  return false;
}

template <class A>
bool scale(const TensorView& scaled, const TensorView& u, const std::vector<A>& c) {
  if (!any(c)) return false;
  const ScaledColumns p{scaled, u, c.data()};
  const WithoutGil others_may_run;
  FASTLORA_CPU_CALL(scale_columns_loop, p);
  return true;
}

// The coefficients of a CPU layer as its gates; `kept` holds them.
template <class A>
FoldLayer with_gates(FoldLayer layer, std::vector<A> c, std::deque<std::vector<A>>& kept) {
  kept.push_back(std::move(c));
  layer.gate = kept.back().data();
  layer.gate_stride = 1;
  return layer;
}

}  // namespace

void check_spectral_results(TensorViews weights, TensorViews us, TensorViews ss, TensorViews vhs,
                            TensorViews shifts, TensorViews strengths, TensorViews outs) {
  check_results(
      "spectral_weights", weights, outs,
      {{"us", us}, {"ss", ss}, {"vhs", vhs}, {"shifts", shifts}, {"strengths", strengths}});
}

void spectral_weights(TensorViews weights, TensorViews us, TensorViews ss, TensorViews vhs,
                      TensorViews shifts, TensorViews strengths, TensorViews outs) {
  std::vector<FoldLayer> on_cpu;
  std::deque<std::vector<float>> gates;
  std::deque<std::vector<double>> double_gates;
  std::vector<OnDevice<SpectralLayer>> on_gpu;
  for (size_t i = 0; i < weights.size(); ++i) {
    const TensorView &weight = weights[i], &out = outs[i];
    check_memory(kOp, "weight", weight, weight);
    check_memory(kOp, "u", us[i], weight);
    check_memory(kOp, "vh", vhs[i], weight);
    check_memory(kOp, "out", out, weight);
    check_coefficients(weight, ss[i], shifts[i], strengths[i]);
    const FoldLayer layer = fold_layer(kOp, weight, vhs[i], us[i], shifts[i], out);
    if (out.numel() == 0) continue;
    if (!weight.cpu())
      add_to_device(on_gpu, weight, SpectralLayer{layer, ss[i].data, strengths[i].data});
    else if (weight.dtype == DType::kFloat64)
      on_cpu.push_back(
          with_gates(layer, coefficients<double>(ss[i], shifts[i], strengths[i]), double_gates));
    else
      on_cpu.push_back(
          with_gates(layer, coefficients<float>(ss[i], shifts[i], strengths[i]), gates));
  }
  check_spectral_results(weights, us, ss, vhs, shifts, strengths, outs);
  if (!on_cpu.empty()) fold_on_cpu(on_cpu.data(), static_cast<int64_t>(on_cpu.size()));
  for (const OnDevice<SpectralLayer>& d : on_gpu) {
#ifdef FASTLORA_CUDA
    launch_spectral_weights(d.layers.data(), static_cast<int64_t>(d.layers.size()),
                            d.tensor.device.device_id, current_stream(d.tensor));
#else
    FASTLORA_CHECK(false, kOp, "weight", "a CPU tensor (this build has no CUDA kernels)", d.tensor);
#endif
  }
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

}  // namespace fastlora
