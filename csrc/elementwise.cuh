// The grid of kernels that stream over tensors, kWidth elements a thread at a time.
#pragma once

#include <cstdint>

#include "types.cuh"

namespace fastlora {

constexpr int kThreads = 256;  // of a block
constexpr int64_t kMaxBlocks = 4096;

// Blocks along x stride over one sample's groups of kWidth elements, blocks along y over samples.
inline dim3 elementwise_grid(int64_t batch, int64_t inner) {
  const int64_t groups = (inner + kWidth - 1) / kWidth;
  const int64_t blocks = (groups + kThreads - 1) / kThreads;
  return dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks),
              static_cast<unsigned>(batch < kMaxBlocks ? batch : kMaxBlocks));
}

}  // namespace fastlora
