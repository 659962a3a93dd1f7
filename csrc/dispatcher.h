// The eager fast path of an operator: guards, then a cache from the arguments' signature to a plan.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace fastlora {

// A plan in C++: a capsule of this name around a function that takes the views of the operator's
// arguments (undefined for None) and returns a new reference. Otherwise a plan is a Python
// callable.
constexpr const char* kNativePlan = "fastlora.plan";
constexpr size_t kMaxNativeArguments = 8;
using NativePlan = PyObject* (*)(const TensorView* arguments);

// `guards`: zero-argument callables with the value that each returns while nothing of torch's
// interposition (dispatch and function modes, functorch, autocast, tracing) is active.
void set_guards(pybind11::list guards, pybind11::dict forward_ad, pybind11::object grad_enabled,
                pybind11::object set_grad_enabled, pybind11::object is_neg);

void bind_dispatcher(pybind11::module_& m);

}  // namespace fastlora
