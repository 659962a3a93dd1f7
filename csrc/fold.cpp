#include "fold.h"

#include <algorithm>
#include <new>

namespace fastlora {
namespace {

constexpr const char* kOp = "fold";
constexpr int64_t kCacheBytes = 8 << 20;  // more than this will not be in a cache when it is used

int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

std::string item(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

// A result is its layer's weight or memory of its own: tasks run in any order.
void check_results(const TensorViews& weights, const TensorViews& outs) {
  struct Range {
    const char *begin, *end;
    size_t layer;
  };
  std::vector<Range> ranges;
  for (size_t i = 0; i < outs.size(); ++i) {
    const TensorView &w = weights[i], &o = outs[i];
    const int64_t bytes = o.numel() * element_bytes(o.dtype);
    if (bytes == 0) continue;
    const bool same =
        w.data == o.data && w.strides[0] == o.strides[0] && w.strides[1] == o.strides[1];
    const char *begin = o.ptr<const char>(), *other = w.ptr<const char>();
    const bool apart =
        !o.contiguous() || !w.contiguous() || begin + bytes <= other || other + bytes <= begin;
    FASTLORA_CHECK(same || (apart && w.data != o.data), kOp, item("outs", i),
                   "weights[i] itself or memory that does not overlap it", o);
    if (o.contiguous()) ranges.push_back({begin, begin + bytes, i});
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges.size(); ++i)
    FASTLORA_CHECK(ranges[i - 1].end <= ranges[i].begin, kOp, item("outs", ranges[i].layer),
                   "memory that no other layer's result uses", outs[ranges[i].layer]);
}

}  // namespace

FoldLayer fold_layer(const char* op, const TensorView& weight, const TensorView& down,
                     const TensorView& up, const TensorView& gate, const TensorView& result) {
  const DType wide = weight.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  FASTLORA_CHECK(gate.dtype == wide, op, "gate", name_of(wide), gate);
  FASTLORA_CHECK(result.dtype == weight.dtype, op, "out", name_of(weight.dtype), result);
  for (const TensorView* t : {&down, &up})
    FASTLORA_CHECK(t->dtype == weight.dtype || t->dtype == wide, op, "factor",
                   "the dtype of the weight or float32", *t);
  constexpr int64_t kLimit = INT32_MAX;
  FASTLORA_CHECK(weight.shape[0] <= kLimit && weight.shape[1] <= kLimit && up.shape[1] <= kLimit,
                 op, "weight", "dimensions below 2^31", weight);
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
  std::vector<std::vector<FoldLayer>> on_gpu;  // by device
  std::vector<TensorView> on_device;           // one tensor of each
  for (size_t i = 0; i < weights.size(); ++i) {
    const TensorView& weight = weights[i];
    check_memory(kOp, "weights", weight, weight);
    check_memory(kOp, "downs", downs[i], weight);
    check_memory(kOp, "ups", ups[i], weight);
    check_memory(kOp, "gates", gates[i], weight);
    check_memory(kOp, "outs", outs[i], weight);
    const FoldLayer layer = fold_layer(kOp, weight, downs[i], ups[i], gates[i], outs[i]);
    if (weight.cpu()) {
      on_cpu.push_back(layer);
      continue;
    }
    size_t device = 0;
    while (device < on_device.size() &&
           on_device[device].device.device_id != weight.device.device_id)
      ++device;
    if (device == on_device.size()) {
      on_device.push_back(weight);
      on_gpu.emplace_back();
    }
    on_gpu[device].push_back(layer);
  }
  check_results(weights, outs);
  if (!on_cpu.empty()) fold_on_cpu(on_cpu.data(), static_cast<int64_t>(on_cpu.size()));
  for (size_t device = 0; device < on_gpu.size(); ++device) {
#ifdef FASTLORA_CUDA
    launch_fold(on_gpu[device].data(), static_cast<int64_t>(on_gpu[device].size()),
                on_device[device].device.device_id, current_stream(on_device[device]));
#else
    FASTLORA_CHECK(false, kOp, "weights", "CPU tensors (this build has no CUDA kernels)",
                   on_device[device]);
#endif
  }
}

}  // namespace fastlora
