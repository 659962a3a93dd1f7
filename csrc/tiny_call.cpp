#include "tiny_call.h"

#include "lora_linear.h"
#include "python_tensor.h"

namespace py = pybind11;

namespace fastlora {
namespace {

TensorView optional_view(PyObject* object) {
  return object == Py_None ? TensorView{} : view_of(object);
}

// (x, weight, bias, down, up, gate, row_scale) -> y, all contiguous and of the checked contract.
PyObject* lora_linear_tiny(PyObject*, PyObject* const* args, Py_ssize_t) {
  try {
    const TensorView x = view_of(args[0]), up = view_of(args[4]);
    int64_t shape[64];
    for (int32_t i = 0; i < x.ndim; ++i) shape[i] = x.shape[i];
    shape[x.ndim - 1] = up.shape[0];
    TensorView y;
    py::object result =
        py::reinterpret_steal<py::object>(empty_tensor(x, shape, x.ndim, &y));
    lora_linear(y, x, view_of(args[1]), optional_view(args[2]), view_of(args[3]), up,
                view_of(args[5]), optional_view(args[6]), {});
    return result.release().ptr();
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  }
  return nullptr;
}

PyMethodDef g_lora_linear_tiny{
    "lora_linear_tiny",
    reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&lora_linear_tiny)), METH_FASTCALL,
    nullptr};

}  // namespace

void bind_tiny_calls(py::module_& m) {
  m.attr("lora_linear_tiny") =
      py::reinterpret_steal<py::object>(PyCFunction_New(&g_lora_linear_tiny, nullptr));
}

}  // namespace fastlora
