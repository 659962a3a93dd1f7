#include "sampler_step.h"

#include <memory>
#include <optional>

namespace fastlora {
namespace {

constexpr const char* kOp = "sampler_step";
constexpr int64_t kElementsWithoutGil = 1 << 16;  // fewer take less than handing it over

int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

int64_t sample_size(const TensorView& t) {
  int64_t inner = 1;
  for (int32_t i = 1; i < t.ndim; ++i) inner *= t.shape[i];
  return inner;
}

const void* or_null(const TensorView& t) { return t.defined ? t.data : nullptr; }

void on_cpu(SamplerStep p) {
  if (*p.step < 0 || *p.step >= p.steps)
    throw std::invalid_argument("sampler_step: step: expected a row of the table, 0 to " +
                                std::to_string(p.steps - 1) + ", got " + std::to_string(*p.step));
  if (p.batch * p.inner == 0) return;
  std::optional<WithoutGil> others_may_run;
  if (p.batch * p.inner >= kElementsWithoutGil) others_may_run.emplace();
  std::unique_ptr<double[]> memory;
  if (p.reduces()) {
    const int64_t chunks = (p.inner + kSamplerChunk - 1) / kSamplerChunk;
    const int64_t moments = p.rescale != nullptr ? 4 * p.batch * chunks : 0;
    memory.reset(new double[2 * p.batch + moments + (p.dynamic ? p.batch * p.inner : 0)]);
    p.statistics = memory.get();
    const SamplerScratch scratch{memory.get() + 2 * p.batch, memory.get() + 2 * p.batch + moments};
    FASTLORA_CPU_CALL(sampler_statistics_loop, p, scratch);
  }
  FASTLORA_CPU_CALL(sampler_step_loop, p);
}

}  // namespace

void sampler_step(TensorView x_next, TensorView history_next, TensorView model_input,
                  TensorView statistics, TensorView x, TensorViews outputs, TensorView weights,
                  TensorView table, TensorView step, TensorView history, TensorView seeds,
                  TensorView noise, TensorView rescale, TensorView mask, TensorView known,
                  double quantile, double threshold_max, int64_t copies) {
  const auto check = [&x](const char* name, const TensorView& t) {
    check_memory(kOp, name, t, x);
    check_contiguous(kOp, name, t);
  };
  check("x", x);
  for (const TensorView& t : outputs) check("outputs", t);
  check("weights", weights);
  check("table", table);
  check("step", step);
  check("history", history);
  check("seeds", seeds);
  check("noise", noise);
  check("rescale", rescale);
  check("mask", mask);
  check("known", known);
  check("x'", x_next);
  check("h'", history_next);
  check("model input", model_input);
  check("statistics", statistics);

  SamplerStep p{};
  p.batch = x.shape[0];
  p.inner = sample_size(x);
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
  p.history = or_null(history);
  p.histories = history.defined ? static_cast<int32_t>(history.shape[0]) : 0;
  p.seeds = static_cast<const int64_t*>(or_null(seeds));
  p.noise = or_null(noise);
  p.rescale = or_null(rescale);
  p.rescale_batch = rescale.defined ? rescale.shape[0] : 0;
  p.mask = or_null(mask);
  p.known = or_null(known);
  if (mask.defined) {
    p.mask_batch = mask.shape[0];
    p.mask_period = sample_size(mask);
  }
  p.dynamic = quantile > 0;
  if (p.dynamic && p.inner > 0) {
    // The elements are counted in 32 bits on a GPU.
    FASTLORA_CHECK(p.inner < int64_t(1) << 32, kOp, "x", "less than 2^32 elements a sample", x);
    const double at = quantile * static_cast<double>(p.inner - 1);
    p.rank = static_cast<int64_t>(at);
    p.between = at - static_cast<double>(p.rank);
    p.threshold_max = threshold_max;
  }
  p.x_next = x_next.data;
  p.history_next = history.defined ? history_next.data : nullptr;
  p.model_input = model_input.data;
  p.statistics = statistics.data;
  p.x_dtype = x.dtype;
  p.output_dtype = outputs[0].dtype;
  p.input_dtype = model_input.dtype;
  p.weights_dtype = weights.dtype;
  p.table_dtype = table.dtype;

  if (x.cpu()) return on_cpu(p);
#ifdef FASTLORA_CUDA
  if (x.numel() == 0) return;
  FASTLORA_CHECK(!p.reduces() || statistics.defined, kOp, "statistics", "memory for them", x);
  if (p.reduces()) launch_sampler_statistics(p, x.device.device_id, current_stream(x));
  launch_sampler_step(p, x.device.device_id, current_stream(x));
#else
  FASTLORA_CHECK(false, kOp, "x", "a CPU tensor (this build has no CUDA kernels)", x);
#endif
}

}  // namespace fastlora
