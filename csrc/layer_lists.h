// What operators on lists of layers share: where results may lie, and which layers are on a device.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "tensor.h"

namespace fastlora {

int64_t element_bytes(DType dtype);

struct NamedList {
  const char* name;
  const TensorViews& tensors;
};

// A result is its layer's weight or memory of its own: layers are computed in any order. Operands
// with gaps may interleave; of those only what is certain is refused.
void check_results(const char* op, const TensorViews& weights, const TensorViews& outs,
                   std::initializer_list<NamedList> factors);

// The layers of one device, and a tensor on it.
template <class Layer>
struct OnDevice {
  std::vector<Layer> layers;
  TensorView tensor;
};

template <class Layer>
void add_to_device(std::vector<OnDevice<Layer>>& devices, const TensorView& tensor, Layer layer) {
  for (OnDevice<Layer>& d : devices)
    if (d.tensor.device.device_id == tensor.device.device_id)
      return d.layers.push_back(std::move(layer));
  devices.push_back({{std::move(layer)}, tensor});
}

}  // namespace fastlora
