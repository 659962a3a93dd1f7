#include "tiny_call.h"

#include "dispatcher.h"
#include "lora_linear.h"
#include "python_tensor.h"

namespace py = pybind11;

namespace fastlora {
namespace {

using Views = TensorView[7];  // x, weight, bias, down, up, gate, row_scale

// An empty y beside x, which is contiguous as the other arguments are.
py::object empty_output(const TensorView& x, const TensorView& up, TensorView* y) {
  int64_t shape[64];
  for (int32_t i = 0; i < x.ndim; ++i) shape[i] = x.shape[i];
  shape[x.ndim - 1] = up.shape[0];
  return py::reinterpret_steal<py::object>(empty_tensor(x, shape, x.ndim, y));
}

PyObject* lora_linear_plan(const TensorView* arguments) {
  const auto& [x, weight, bias, down, up, gate, row_scale] =
      *reinterpret_cast<const Views*>(arguments);
  TensorView y;
  py::object result = empty_output(x, up, &y);
  lora_linear(y, x, weight, bias, down, up, gate, row_scale, {}, 0);
  return result.release().ptr();
}

}  // namespace

void bind_tiny_calls(py::module_& m) {
  m.attr("lora_linear_plan") = py::capsule(reinterpret_cast<void*>(&lora_linear_plan), kNativePlan);
}

}  // namespace fastlora
