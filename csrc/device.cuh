// What kernels use beyond CUDA C++: shared memory and accesses that the emulator can see. On a GPU
// all of it is the plain thing. Included by .cu files only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// FASTLORA_SHARED(tile, float[16][128]): `__shared__ float tile[16][128]`, 16-byte aligned, one for
// the block wherever the declaration is reached.
#ifdef FASTLORA_EMULATED
#define FASTLORA_SHARED(name, ...)                \
  using name##_type = __VA_ARGS__;                \
  static const char name##_key = 0;               \
  name##_type& name = *static_cast<name##_type*>( \
      ::fastlora::emulator::block().shared(&name##_key, sizeof(name##_type), #name))
#else
#define FASTLORA_SHARED(name, ...) \
  using name##_type = __VA_ARGS__; \
  __shared__ __align__(16) name##_type name
#endif

namespace fastlora {

#ifdef FASTLORA_EMULATED

using emulator::Here;
using emulator::readable;
using emulator::writable;

// The shared memory whose size is an argument of `launch`.
inline void* dynamic_shared() { return emulator::block().dynamic_shared(); }

#else

// A place in the source, for the emulator's messages.
struct Here {
  __host__ __device__ static constexpr Here current() { return {}; }
};

// `p`, of which `count` elements are about to be read (written) in accesses of `alignment` bytes.
template <class T>
__device__ __forceinline__ const T* readable(const T* p, size_t = 1, size_t = 1, Here = {}) {
  return p;
}
template <class T>
__device__ __forceinline__ T* writable(T* p, size_t = 1, size_t = 1, Here = {}) {
  return p;
}

__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ uint4 fastlora_dynamic_shared[];
  return fastlora_dynamic_shared;
}

#endif

}  // namespace fastlora
