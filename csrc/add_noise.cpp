#include "add_noise.h"

namespace fastlora {
namespace {

constexpr const char* kOp = "add_noise";

}  // namespace

void add_noise(TensorView x_t, TensorView target, TensorView x0, TensorView noise, TensorView seeds,
               TensorView t, TensorView table) {
  const struct {
    const char* name;
    const TensorView& view;
  } arguments[] = {{"x0", x0},       {"noise", noise}, {"seeds", seeds},  {"t", t},
                   {"table", table}, {"x_t", x_t},     {"target", target}};
  for (const auto& a : arguments) {
    check_memory(kOp, a.name, a.view, x0);
    check_contiguous(kOp, a.name, a.view);
  }

  AddNoise p{};
  p.x0 = x0.data;
  p.noise = noise.defined ? noise.data : nullptr;
  p.seeds = seeds.defined ? seeds.ptr<const int64_t>() : nullptr;
  p.t = t.ptr<const int64_t>();
  p.table = table.data;
  p.x_t = x_t.data;
  p.target = target.data;
  p.batch = x0.shape[0];
  p.inner = 1;
  for (int32_t i = 1; i < x0.ndim; ++i) p.inner *= x0.shape[i];
  p.steps = table.shape[0];
  p.dtype = x0.dtype;
  p.table_dtype = table.dtype;

  if (x0.cpu()) {
    for (int64_t b = 0; b < p.batch; ++b)
      if (p.t[b] < 0 || p.t[b] >= p.steps)
        throw std::invalid_argument("add_noise: t: expected rows of the table, 0 to " +
                                    std::to_string(p.steps - 1) + ", got " +
                                    std::to_string(p.t[b]));
    if (x0.numel() == 0) return;
    FASTLORA_CPU_CALL(add_noise_loop, p);
    return;
  }
#ifdef FASTLORA_CUDA
  if (x0.numel() == 0) return;
  launch_add_noise(p, x0.device.device_id, current_stream(x0));
#else
  FASTLORA_CHECK(false, kOp, "x0", "a CPU tensor (this build has no CUDA kernels)", x0);
#endif
}

}  // namespace fastlora
