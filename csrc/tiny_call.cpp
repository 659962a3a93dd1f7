#include "tiny_call.h"

#include "dispatcher.h"
#include "lora_linear.h"
#include "python_tensor.h"

namespace py = pybind11;

namespace fastlora {
namespace {

// (x, weight, bias, down, up, gate, row_scale) -> y, all contiguous and of the checked contract.
PyObject* lora_linear_tiny(const TensorView* arguments) {
  const auto& [x, weight, bias, down, up, gate, row_scale] =
      *reinterpret_cast<const TensorView(*)[7]>(arguments);
  int64_t shape[64];
  for (int32_t i = 0; i < x.ndim; ++i) shape[i] = x.shape[i];
  shape[x.ndim - 1] = up.shape[0];
  TensorView y;
  py::object result = py::reinterpret_steal<py::object>(empty_tensor(x, shape, x.ndim, &y));
  lora_linear(y, x, weight, bias, down, up, gate, row_scale, {}, 0);
  return result.release().ptr();
}

}  // namespace

void bind_tiny_calls(py::module_& m) {
  m.attr("lora_linear_tiny") = py::capsule(reinterpret_cast<void*>(&lora_linear_tiny), kNativePlan);
}

}  // namespace fastlora
