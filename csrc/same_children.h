// Whether a walk over a tree of modules would find what it found.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlora {

// Whether the values of the dicts, one dict after another, are the very objects in `children`.
bool same_children(pybind11::tuple dicts, pybind11::tuple children);

}  // namespace fastlora
