// Native plans (dispatcher.h): one call allocates the output and runs the CPU loop. For tensors so
// small that a Python frame would cost as much as the arithmetic, and for all others alike.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlora {

void bind_tiny_calls(pybind11::module_& m);

}  // namespace fastlora
