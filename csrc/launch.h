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

namespace detail {

// What the compiler says of a kernel on the current device.
template <class Kernel>
const cudaFuncAttributes& attributes_of(Kernel* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, cudaFuncAttributes> known;
  std::pair<int, const void*> key{0, reinterpret_cast<const void*>(kernel)};
  check_cuda(cudaGetDevice(&key.first), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return known[key] = attributes;
}

// The architecture that a kernel's source was compiled for (80, 90, ...) on the current device.
template <class Kernel>
int compiled_for(Kernel* kernel) {
  return attributes_of(kernel).ptxVersion;
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

// Lets a kernel have more than 48 KB of shared memory, `bytes` of it dynamic.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  if (size_t(bytes) + detail::attributes_of(kernel).sharedSizeBytes > (48 << 10))
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
               "shared memory");
}

// Whether a kernel that wants tensor cores and asynchronous copies (sm_80) has them on the current
// device: code for an older GPU, which a newer one runs as well, is compiled without.
template <class Kernel>
bool has_tensor_cores(Kernel* kernel) {
  return detail::compiled_for(kernel) >= 80;
}

// Whether a kernel that wants the matrix instructions of warpgroups (sm_90a) has them on the
// current device. Compiled for sm_90 without the suffix it is empty, which its registers tell: with
// them it keeps 128 sums.
template <class Kernel>
bool has_warpgroup_products(Kernel* kernel) {
  const cudaFuncAttributes& attributes = detail::attributes_of(kernel);
  return attributes.ptxVersion / 10 == 9 && attributes.numRegs > 128;
}

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "multiprocessors");
  return count;
}

// Bytes of parameters that every launch may have, and that one may have here: more since CUDA 12.1,
// given a driver of that time (R530).
constexpr size_t kParameterBytes = 4096;
#if CUDART_VERSION >= 12010
constexpr size_t kLargeParameterBytes = 32760;
inline bool takes_large_parameters() {
  static const bool taken = [] {
    int version = 0;
    check_cuda(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
    return version >= 12010;
  }();
  return taken;
}
#else
constexpr size_t kLargeParameterBytes = kParameterBytes;
inline bool takes_large_parameters() { return false; }
#endif

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
