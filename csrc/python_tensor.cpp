#include "python_tensor.h"

namespace fastlora {
namespace {

DLDataType dlpack_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return {kDLFloat, 16, 1};
    case DType::kBFloat16: return {kDLBfloat, 16, 1};
    case DType::kFloat64: return {kDLFloat, 64, 1};
    case DType::kInt64: return {kDLInt, 64, 1};
    default: return {kDLFloat, 32, 1};
  }
}

const DLPackExchangeAPI* g_api = nullptr;
PyTypeObject* g_tensor = nullptr;
PyTypeObject* g_parameter = nullptr;

}  // namespace

void set_exchange_api(pybind11::capsule capsule, pybind11::type tensor, pybind11::type parameter) {
  const auto* api = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw pybind11::error_already_set();
  // A newer major version may chain to the one written down in dlpack.h.
  while (api != nullptr && api->header.version.major != 1)
    api = reinterpret_cast<const DLPackExchangeAPI*>(api->header.prev_api);
  if (api == nullptr || api->dltensor_from_py_object_no_sync == nullptr)
    throw std::runtime_error("fastlora: torch offers no DLPack exchange API of major version 1");
  g_api = api;
  g_tensor = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
  g_parameter = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
}

bool is_plain_tensor(PyObject* object) {
  return Py_TYPE(object) == g_tensor || Py_TYPE(object) == g_parameter;
}

TensorView view_of(PyObject* object) {
  if (!is_plain_tensor(object))
    throw pybind11::type_error(std::string("fastlora: expected a plain torch.Tensor, got ") +
                               Py_TYPE(object)->tp_name);
  DLTensor t;
  if (g_api->dltensor_from_py_object_no_sync(object, &t) != 0) throw pybind11::error_already_set();
  TensorView view;
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.shape = t.shape;
  view.strides = t.strides;
  view.ndim = t.ndim;
  view.dtype = dtype_of(t.dtype);
  view.device = t.device;
  view.defined = true;
  return view;
}

PyObject* empty_tensor(const TensorView& like, const int64_t* shape, int32_t ndim,
                       TensorView* view) {
  DLTensor prototype{};
  prototype.device = like.device;
  prototype.ndim = ndim;
  prototype.dtype = dlpack_of(like.dtype);
  prototype.shape = const_cast<int64_t*>(shape);
  DLManagedTensorVersioned* managed = nullptr;
  const auto set_error = [](void*, const char*, const char* message) {
    PyErr_SetString(PyExc_RuntimeError, message);
  };
  void* object = nullptr;
  if (g_api->managed_tensor_allocator(&prototype, &managed, nullptr, set_error) != 0 ||
      g_api->managed_tensor_to_py_object_no_sync(managed, &object) != 0)
    throw pybind11::error_already_set();
  *view = view_of(static_cast<PyObject*>(object));
  return static_cast<PyObject*>(object);
}

void* current_stream(const TensorView& t) {
  void* stream = nullptr;
  if (t.device.device_type != kDLCPU &&
      g_api->current_work_stream(t.device.device_type, t.device.device_id, &stream) != 0)
    throw pybind11::error_already_set();
  return stream;
}

WithoutGil::WithoutGil() : state_(PyEval_SaveThread()) {}
WithoutGil::~WithoutGil() { PyEval_RestoreThread(static_cast<PyThreadState*>(state_)); }

}  // namespace fastlora
