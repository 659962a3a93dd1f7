#include "layer_lists.h"

#include <algorithm>
#include <numeric>

namespace fastlora {

int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

namespace {

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

}  // namespace

void check_results(const char* op, const TensorViews& weights, const TensorViews& outs,
                   std::initializer_list<NamedList> factors) {
  std::vector<Range> results;
  for (size_t i = 0; i < outs.size(); ++i) {
    const TensorView &w = weights[i], &o = outs[i];
    if (o.numel() == 0) continue;
    FASTLORA_CHECK(!overlaps_itself(o), op, item("outs", i), "memory of its own for every element",
                   o);
    FASTLORA_CHECK(w.data != o.data || same_elements(w, o), op, item("outs", i),
                   "weights[i] itself or memory that does not overlap it", o);
    if (solid(o)) results.push_back(range_of(o, i));
  }
  std::sort(results.begin(), results.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < results.size(); ++i)
    FASTLORA_CHECK(results[i - 1].end <= results[i].begin, op, item("outs", results[i].layer),
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
      FASTLORA_CHECK(own && same_elements(inputs[i], o), op, item("outs", found->layer),
                     own ? "weights[i] itself or memory that does not overlap it"
                         : "memory that does not overlap " + item(name, i),
                     o);
    }
  };
  check_inputs("weights", weights);
  for (const NamedList& list : factors) check_inputs(list.name, list.tensors);
}

}  // namespace fastlora
