// W' = W + U diag(g) D for all layers of a device.
#include "fold.h"
#include "rank_update.cuh"

namespace fastlora {

void launch_fold(const FoldLayer* layers, int64_t count, int device, void* stream) {
  const DeviceGuard guard(device);
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    std::vector<DeviceLayer> group;
    for (int64_t i = 0; i < count; ++i)
      if (layers[i].dtype == dtype) group.emplace_back(layers[i]);
    launch_rank_update(group, dtype, stream);
  }
}

}  // namespace fastlora
