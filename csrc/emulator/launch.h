// `launch` of csrc/launch.h on the emulator. Included by .cu files only.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <utility>

#include "call.h"

namespace fastlora {

// There is one emulated device, and it is always the current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
};

template <class Kernel>
bool has_tensor_cores(Kernel*) {
  return emulator::capability() >= 80;
}

template <class Kernel>
bool has_warpgroup_products(Kernel*) {
  return emulator::capability() == 90;
}
// Few, so that a block that stays for several tiles has several.
inline int multiprocessors() { return 2; }

constexpr size_t kParameterBytes = 4096, kLargeParameterBytes = 32760;
inline bool takes_large_parameters() { return true; }

template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  emulator::allow_shared_memory(reinterpret_cast<const void*>(kernel), size_t(bytes));
}

namespace emulator {

inline Index index_of(dim3 d) { return {d.x, d.y, d.z}; }

template <class... Parameters, class... Arguments>
void launch(const char* name, bool dependent, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, Arguments&&... arguments) {
  Launch l;
  l.name = name;
  l.grid = index_of(grid);
  l.block = index_of(block);
  l.shared_bytes = shared_bytes;
  l.shared_allowed = shared_memory_allowed(reinterpret_cast<const void*>(kernel), shared_bytes);
  // Every thread gets parameters of its own, as every GPU thread does.
  const std::tuple<Parameters...> parameters(Parameters(std::forward<Arguments>(arguments))...);
  l.body = [kernel, parameters] { std::apply(kernel, parameters); };
  current_call().launch(l, dependent);
}

}  // namespace emulator

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, void*, Arguments&&... arguments) {
  emulator::launch(name, false, kernel, grid, block, shared_bytes,
                   std::forward<Arguments>(arguments)...);
}

template <class... Parameters, class... Arguments>
void launch_dependent(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                      size_t shared_bytes, void*, Arguments&&... arguments) {
  emulator::launch(name, true, kernel, grid, block, shared_bytes,
                   std::forward<Arguments>(arguments)...);
}

}  // namespace fastlora
