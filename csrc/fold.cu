// W' = W + U diag(g) D for all layers of a device, some dozens a launch.
#include "fold.h"
#include "rank_update.cuh"

namespace fastlora {

void launch_fold(const FoldLayer* layers, int64_t count, int device, void* stream) {
  const DeviceGuard guard(device);
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    RankUpdate<FoldLayer> update(dtype, stream);
    for (int64_t i = 0; i < count; ++i)
      if (layers[i].dtype == dtype) update.add(layers[i]);
    update.finish();
  }
}

}  // namespace fastlora
