// From a Python object to a TensorView: the only place that knows both.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace fastlora {

// Called once from Python with torch.Tensor's exchange capsule and the two exact tensor types.
void set_exchange_api(pybind11::capsule capsule, pybind11::type tensor, pybind11::type parameter);

// True for exactly torch.Tensor and torch.nn.Parameter: subclasses may not have plain memory.
bool is_plain_tensor(PyObject* object);

// Borrowed view of a torch tensor; throws TypeError for any other object.
TensorView view_of(PyObject* object);

// A new, uninitialised torch tensor (new reference) with `like`'s dtype and device.
PyObject* empty_tensor(const TensorView& like, const int64_t* shape, int32_t ndim,
                       TensorView* view);

}  // namespace fastlora

namespace pybind11::detail {

template <>
struct type_caster<fastlora::TensorView> {
  PYBIND11_TYPE_CASTER(fastlora::TensorView, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    if (!source.is_none()) value = fastlora::view_of(source.ptr());
    return true;
  }
};

template <>
struct type_caster<fastlora::TensorViews> {
  PYBIND11_TYPE_CASTER(fastlora::TensorViews, const_name("list[torch.Tensor]"));
  bool load(handle source, bool) {
    if (!PyList_Check(source.ptr()) && !PyTuple_Check(source.ptr())) return false;
    PyObject* items = source.ptr();
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(items);
    value.reserve(n);
    for (Py_ssize_t i = 0; i < n; ++i)
      value.push_back(fastlora::view_of(PySequence_Fast_GET_ITEM(items, i)));
    return true;
  }
};

}  // namespace pybind11::detail
