// Every kernel is launched through `launch`, so that the same sources can run elsewhere than on a
// GPU. Included by .cu files only.
#pragma once

#ifdef FASTLORA_EMULATED
#include "emulator/launch.h"
#else

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastlora {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("fastlora: ") + what + ": " + cudaGetErrorString(status));
}

// Kernels run on the device of their tensors, which need not be the current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Lets a kernel have more than 48 KB of dynamic shared memory.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  if (bytes > (48 << 10))
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
               "shared memory");
}

namespace detail {

// The architecture that a kernel's source was compiled for (80, 90, ...).
template <class Kernel>
int compiled_for(Kernel* kernel) {
  static std::mutex mutex;
  static std::map<const void*, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(reinterpret_cast<const void*>(kernel));
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return known[reinterpret_cast<const void*>(kernel)] = attributes.ptxVersion;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, bool dependent, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, void* stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  // A kernel that the driver compiled from older PTX has no wait in it.
  config.numAttrs = dependent && compiled_for(kernel) >= 90 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...),
             name);
}

}  // namespace detail

// `name` is for messages.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, void* stream, Arguments&&... arguments) {
  detail::launch(name, false, kernel, grid, block, shared_bytes, stream,
                 std::forward<Arguments>(arguments)...);
}

// The same for a kernel that may start before the one before it has finished (sm_90 and newer), and
// therefore calls wait_for_previous_kernel() (ptx.cuh) before it touches what that one writes.
template <class... Parameters, class... Arguments>
void launch_dependent(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                      size_t shared_bytes, void* stream, Arguments&&... arguments) {
  detail::launch(name, true, kernel, grid, block, shared_bytes, stream,
                 std::forward<Arguments>(arguments)...);
}

}  // namespace fastlora

#endif
