#include "fold.h"

#include <algorithm>
#include <new>
#include <numeric>

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

// Whether the elements of a view fill their memory without gaps, in whatever order; several indices
// may mean one element (a stride of 0).
bool solid(const TensorView& t) {
  int64_t span = 1, count = 1;
  bool unit = false;
  for (int32_t i = 0; i < t.ndim; ++i) {
    if (t.shape[i] == 1 || t.strides[i] == 0) continue;
    span += (t.shape[i] - 1) * t.strides[i];
    count *= t.shape[i];
    unit = unit || t.strides[i] == 1;
  }
  return span == count && (unit || count == 1);
}

// Whether two indices of a matrix mean one element: a i = b j within its bounds.
bool overlaps_itself(const TensorView& t) {
  const int64_t a = t.strides[0], b = t.strides[1];
  if (t.numel() == 0) return false;
  if ((a == 0 && t.shape[0] > 1) || (b == 0 && t.shape[1] > 1)) return true;
  if (t.shape[0] == 1 || t.shape[1] == 1) return false;
  const int64_t common = std::gcd(a, b);
  return b / common < t.shape[0] && a / common < t.shape[1];
}

bool same_elements(const TensorView& a, const TensorView& b) {
  bool same = a.data == b.data;
  for (int i = 0; i < 2; ++i) same = same && (a.shape[i] == 1 || a.strides[i] == b.strides[i]);
  return same;
}

struct Range {
  const char *begin, *end;
  size_t layer;
};

// What is known of a view's memory without looking at every element: all of it where it has no
// gaps, else its first element.
Range range_of(const TensorView& t, size_t layer) {
  int64_t elements = 1;
  if (solid(t))
    for (int32_t i = 0; i < t.ndim; ++i) elements *= t.strides[i] == 0 ? 1 : t.shape[i];
  const char* begin = t.ptr<const char>();
  return {begin, begin + elements * element_bytes(t.dtype), layer};
}

// A result is its layer's weight or memory of its own: tasks run in any order. Operands with gaps
// may interleave; of those only what is certain is refused.
void check_results(const TensorViews& weights, const TensorViews& downs, const TensorViews& ups,
                   const TensorViews& gates, const TensorViews& outs) {
  std::vector<Range> results;
  for (size_t i = 0; i < outs.size(); ++i) {
    const TensorView &w = weights[i], &o = outs[i];
    if (o.numel() == 0) continue;
    FASTLORA_CHECK(!overlaps_itself(o), kOp, item("outs", i), "memory of its own for every element",
                   o);
    FASTLORA_CHECK(w.data != o.data || same_elements(w, o), kOp, item("outs", i),
                   "weights[i] itself or memory that does not overlap it", o);
    if (solid(o)) results.push_back(range_of(o, i));
  }
  std::sort(results.begin(), results.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < results.size(); ++i)
    FASTLORA_CHECK(results[i - 1].end <= results[i].begin, kOp, item("outs", results[i].layer),
                   "memory that no other layer's result uses", outs[results[i].layer]);
  const auto check_inputs = [&](const char* name, const TensorViews& inputs) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].numel() == 0) continue;
      const Range input = range_of(inputs[i], i);
      // the first result that ends behind the input's begin; they are sorted and lie apart
      const auto found = std::partition_point(results.begin(), results.end(),
                                              [&](const Range& r) { return r.end <= input.begin; });
      if (found == results.end() || input.end <= found->begin) continue;
      const bool own = &inputs == &weights && found->layer == i;
      const TensorView& o = outs[found->layer];
      FASTLORA_CHECK(own && same_elements(inputs[i], o), kOp, item("outs", found->layer),
                     own ? "weights[i] itself or memory that does not overlap it"
                         : "memory that does not overlap " + item(name, i),
                     o);
    }
  };
  check_inputs("weights", weights);
  check_inputs("downs", downs);
  check_inputs("ups", ups);
  check_inputs("gates", gates);
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
  check_results(weights, downs, ups, gates, outs);
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
