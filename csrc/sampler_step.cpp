#include "sampler_step.h"

namespace fastlora {
namespace {

constexpr const char* kOp = "sampler_step";

int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

void check_tensor(const char* name, const TensorView& t, const TensorView& x) {
  check_memory(kOp, name, t, x);
  check_contiguous(kOp, name, t);
}

}  // namespace

void sampler_step(TensorView x_next, TensorView history_next, TensorView model_input, TensorView x,
                  TensorViews outputs, TensorView weights, TensorView table, TensorView step,
                  TensorView history, TensorView seeds, int64_t copies) {
  check_tensor("x", x, x);
  for (const TensorView& t : outputs) check_tensor("outputs", t, x);
  check_tensor("weights", weights, x);
  check_tensor("table", table, x);
  check_tensor("step", step, x);
  check_tensor("history", history, x);
  check_tensor("seeds", seeds, x);
  check_tensor("x'", x_next, x);
  check_tensor("h'", history_next, x);
  check_tensor("model input", model_input, x);

  SamplerStep p{};
  p.batch = x.shape[0];
  p.inner = 1;
  for (int32_t i = 1; i < x.ndim; ++i) p.inner *= x.shape[i];
  p.n = static_cast<int32_t>(weights.shape[1]);
  p.steps = table.shape[0];
  p.weight_steps = weights.shape[0];
  p.weight_batch = weights.shape[2];
  p.copies = copies;
  p.x = x.data;
  const bool stacked = static_cast<int32_t>(outputs.size()) < p.n;  // all in one tensor
  for (int32_t j = 0; j < p.n; ++j)
    p.outputs[j] = stacked
                       ? outputs[0].ptr<const char>() + j * x.numel() * size_of(outputs[0].dtype)
                       : outputs[j].data;
  p.weights = weights.data;
  p.table = table.data;
  p.step = step.ptr<const int64_t>();
  p.history = history.defined ? history.data : nullptr;
  p.seeds = seeds.defined ? seeds.ptr<const int64_t>() : nullptr;
  p.x_next = x_next.data;
  p.history_next = history.defined ? history_next.data : nullptr;
  p.model_input = model_input.data;
  p.x_dtype = x.dtype;
  p.output_dtype = outputs[0].dtype;
  p.input_dtype = model_input.dtype;
  p.weights_dtype = weights.dtype;
  p.table_dtype = table.dtype;

  if (x.cpu()) {
    if (*p.step < 0 || *p.step >= p.steps)
      throw std::invalid_argument("sampler_step: step: expected a row of the table, 0 to " +
                                  std::to_string(p.steps - 1) + ", got " + std::to_string(*p.step));
    if (x.numel() == 0) return;
    FASTLORA_CPU_CALL(sampler_step_loop, p);
    return;
  }
#ifdef FASTLORA_CUDA
  if (x.numel() == 0) return;
  launch_sampler_step(p, x.device.device_id, current_stream(x));
#else
  FASTLORA_CHECK(false, kOp, "x", "a CPU tensor (this build has no CUDA kernels)", x);
#endif
}

}  // namespace fastlora
