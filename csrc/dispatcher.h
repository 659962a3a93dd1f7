// The eager fast path of an operator: guards, then a cache from the arguments' signature to a plan.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlora {

// `guards`: zero-argument callables with the value that each returns while nothing of torch's
// interposition (dispatch and function modes, functorch, autocast, tracing) is active.
void set_guards(pybind11::list guards, pybind11::dict forward_ad, pybind11::object grad_enabled,
                pybind11::object is_neg);

void bind_dispatcher(pybind11::module_& m);

}  // namespace fastlora
