// W' = W + U diag(relu(s + strength·δ) - s) Vᵀ for all layers of a device, and which kernel
// computes which of them.
#include <algorithm>

#include "rank_update.cuh"
#include "spectral_weight_sm90.cuh"

namespace fastlora {

// A layer of the rank update whose coefficients follow from singular values and their shift.
struct SpectralUpdate : DeviceLayer {
  const float *s, *strength;

  SpectralUpdate() = default;
  explicit SpectralUpdate(const SpectralLayer& p)
      : DeviceLayer(p),
        s(static_cast<const float*>(p.s)),
        strength(static_cast<const float*>(p.strength)) {}
};

__device__ __forceinline__ float coefficient(const SpectralUpdate& p, int64_t k) {
  return spectral_coefficient(p.s[k], *p.strength * static_cast<const float*>(p.gate)[k]);
}

namespace {

// Layers of one dtype. 16-bit weights and factors take the tensor cores' rate, and round U diag(c)
// once as the reference does; all else goes the way of the fold: float32 by plain arithmetic,
// float32 factors of 16-bit weights in two parts, all on GPUs older than sm_80.
template <class T>
void launch_spectral_weights(const std::vector<SpectralLayer>& layers, void* stream) {
  std::vector<SpectralUpdate> updates;
  if constexpr (sizeof(T) == 2) {
    std::vector<DeviceSpectral> wide, products;
    using Few = LayerGroup<DeviceSpectral, kParameterBytes>;
    const bool tensor_cores = has_tensor_cores(spectral_weight_sm80_kernel<T, Few>);
    const bool warpgroups = has_spectral_weight_sm90<T>();
    for (const SpectralLayer& layer : layers) {
      const DeviceSpectral p(layer);
      if (warpgroups && takes_spectral_sm90(p))
        wide.push_back(p);
      else if (tensor_cores && takes_spectral_sm80(p))
        products.push_back(p);
      else
        updates.emplace_back(layer);
    }
    // Blocks of one rank take one time: the long ones first, the short ones fill the gaps.
    for (auto* group : {&wide, &products})
      std::stable_sort(group->begin(), group->end(),
                       [](const auto& a, const auto& b) { return a.rank > b.rank; });
    launch_spectral_weights_sm90<T>(wide, stream);
    launch_spectral_weights_sm80<T>(products, stream);
  } else {
    for (const SpectralLayer& layer : layers) updates.emplace_back(layer);
  }
  launch_rank_update<T>(updates, stream);
}

}  // namespace

void launch_spectral_weights(const SpectralLayer* layers, int64_t count, int device, void* stream) {
  const DeviceGuard guard(device);
  std::vector<SpectralLayer> group;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    group.clear();
    std::copy_if(layers, layers + count, std::back_inserter(group),
                 [&](const SpectralLayer& p) { return p.dtype == dtype; });
    switch (dtype) {
      case DType::kFloat16: launch_spectral_weights<__half>(group, stream); break;
      case DType::kBFloat16: launch_spectral_weights<__nv_bfloat16>(group, stream); break;
      default: launch_spectral_weights<float>(group, stream);
    }
  }
}

}  // namespace fastlora
