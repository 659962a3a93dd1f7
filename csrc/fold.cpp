#include "fold.h"

#include <new>

#include "layer_lists.h"

namespace fastlora {
namespace {

constexpr const char* kOp = "fold";
constexpr int64_t kCacheBytes = 8 << 20;  // more than this will not be in a cache when it is used

}  // namespace

FoldLayer fold_layer(const char* op, const TensorView& weight, const TensorView& down,
                     const TensorView& up, const TensorView& gate, const TensorView& result) {
  const DType wide = weight.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  FASTLORA_CHECK(gate.dtype == wide, op, "gate", name_of(wide), gate);
  FASTLORA_CHECK(result.dtype == weight.dtype, op, "out", name_of(weight.dtype), result);
  for (const TensorView* t : {&down, &up})
    FASTLORA_CHECK(t->dtype == weight.dtype || t->dtype == wide, op, "factor",
                   "the dtype of the weight or float32", *t);
  constexpr int64_t kLimit = INT32_MAX - 256;  // a tile may reach beyond the edge
  FASTLORA_CHECK(weight.shape[0] <= kLimit && weight.shape[1] <= kLimit && up.shape[1] <= kLimit,
                 op, "weight", "dimensions below 2^31", weight);
  const auto strides_fit = [&](const char* name, const TensorView& t) {
    bool fit = true;
    for (int32_t i = 0; i < t.ndim; ++i)
      fit = fit && (t.shape[i] <= 1 || t.strides[i] <= INT32_MAX);
    FASTLORA_CHECK(weight.cpu() || fit, op, name, "strides below 2^31 elements on CUDA", t);
  };
  strides_fit("weight", weight);
  strides_fit("down", down);
  strides_fit("up", up);
  strides_fit("gate", gate);
  strides_fit("out", result);
  FoldLayer p{};
  p.weight = weight.data;
  p.result = result.data;
  p.down = down.data;
  p.up = up.data;
  p.gate = gate.data;
  for (int i = 0; i < 2; ++i) {
    p.weight_stride[i] = weight.strides[i];
    p.result_stride[i] = result.strides[i];
    p.down_stride[i] = down.strides[i];
    p.up_stride[i] = up.strides[i];
  }
  p.gate_stride = gate.strides[0];
  p.out = static_cast<int32_t>(weight.shape[0]);
  p.in = static_cast<int32_t>(weight.shape[1]);
  p.rank = static_cast<int32_t>(up.shape[1]);
  p.dtype = weight.dtype;
  p.down_dtype = down.dtype;
  p.up_dtype = up.dtype;
  return p;
}

void fold_on_cpu(const FoldLayer* layers, int64_t count) {
  std::vector<int64_t> first_task(count + 1, 0);
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    const FoldLayer& p = layers[i];
    const int64_t tasks = p.in > 0 ? (p.out + kFoldRows - 1) / kFoldRows : 0;
    first_task[i + 1] = first_task[i] + tasks;
    bytes += int64_t(p.out) * p.in * element_bytes(p.dtype);
  }
  if (first_task[count] == 0) return;
  FoldTasks tasks{layers, count, first_task.data(), bytes > kCacheBytes, false};
  {
    const WithoutGil others_may_run;
    FASTLORA_CPU_CALL(fold_loop, tasks);
  }
  if (tasks.out_of_memory) throw std::bad_alloc();
}

void fold(TensorViews weights, TensorViews downs, TensorViews ups, TensorViews gates,
          TensorViews outs) {
  std::vector<FoldLayer> on_cpu;
  std::vector<OnDevice<FoldLayer>> on_gpu;
  for (size_t i = 0; i < weights.size(); ++i) {
    const TensorView& weight = weights[i];
    check_memory(kOp, "weights", weight, weight);
    check_memory(kOp, "downs", downs[i], weight);
    check_memory(kOp, "ups", ups[i], weight);
    check_memory(kOp, "gates", gates[i], weight);
    check_memory(kOp, "outs", outs[i], weight);
    const FoldLayer layer = fold_layer(kOp, weight, downs[i], ups[i], gates[i], outs[i]);
    if (weight.cpu())
      on_cpu.push_back(layer);
    else
      add_to_device(on_gpu, weight, layer);
  }
  check_results(kOp, weights, outs, {{"downs", downs}, {"ups", ups}, {"gates", gates}});
  if (!on_cpu.empty()) fold_on_cpu(on_cpu.data(), static_cast<int64_t>(on_cpu.size()));
  for (const OnDevice<FoldLayer>& d : on_gpu) {
#ifdef FASTLORA_CUDA
    launch_fold(d.layers.data(), static_cast<int64_t>(d.layers.size()), d.tensor.device.device_id,
                current_stream(d.tensor));
#else
    FASTLORA_CHECK(false, kOp, "weights", "CPU tensors (this build has no CUDA kernels)", d.tensor);
#endif
  }
}

}  // namespace fastlora
