#include "same_children.h"

namespace fastlora {

bool same_children(pybind11::tuple dicts, pybind11::tuple children) {
  const Py_ssize_t count = PyTuple_GET_SIZE(children.ptr());
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(dicts.ptr()); ++i) {
    PyObject* dict = PyTuple_GET_ITEM(dicts.ptr(), i);
    if (!PyDict_Check(dict)) return false;
    Py_ssize_t position = 0;
    PyObject* child = nullptr;
    while (PyDict_Next(dict, &position, nullptr, &child))
      if (at == count || PyTuple_GET_ITEM(children.ptr(), at++) != child) return false;
  }
  return at == count;
}

}  // namespace fastlora
