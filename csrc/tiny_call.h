// Native plans (dispatcher.h) for tensors so small that a Python frame costs as much as the
// arithmetic: one call allocates the output and runs the CPU loop.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlora {

void bind_tiny_calls(pybind11::module_& m);

}  // namespace fastlora
