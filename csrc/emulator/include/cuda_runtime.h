// The CUDA C++ that kernels are written in, for a host compiler: found instead of the toolkit's
// header of this name when the emulator is built. Only what kernels of this project may use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../block.h"
#include "../memory.h"
#include "../warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// clang-format off
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
// clang-format on
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#define threadIdx (::fastlora::emulator::block().current().index)
#define blockIdx (::fastlora::emulator::block().index())
#define blockDim (::fastlora::emulator::block().launch().block)
#define gridDim (::fastlora::emulator::block().launch().grid)
constexpr int warpSize = 32;

// --- barriers, votes, shuffles -------------------------------------------------------------------

#define FASTLORA_EMULATED_HERE \
  ::fastlora::emulator::Here here = ::fastlora::emulator::Here::current()

inline void __syncthreads(FASTLORA_EMULATED_HERE) {
  ::fastlora::emulator::block().sync_threads(here);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, FASTLORA_EMULATED_HERE) {
  ::fastlora::emulator::sync_warp(mask, here);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, FASTLORA_EMULATED_HERE) {
  return ::fastlora::emulator::ballot(mask, predicate != 0, "__ballot_sync", here);
}
inline int __any_sync(unsigned mask, int predicate, FASTLORA_EMULATED_HERE) {
  return ::fastlora::emulator::ballot(mask, predicate != 0, "__any_sync", here) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FASTLORA_EMULATED_HERE) {
  return ::fastlora::emulator::ballot(mask, predicate != 0, "__all_sync", here) == mask;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, FASTLORA_EMULATED_HERE) {
  return ::fastlora::emulator::shuffle(
      mask, value, [=](int self) { return (self & ~(width - 1)) | (lane & (width - 1)); },
      "__shfl_sync", here);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, FASTLORA_EMULATED_HERE) {
  return ::fastlora::emulator::shuffle(
      mask, value,
      [=](int self) {
        const int from = self ^ bits;  // a lane of a later group is not reached
        return from / width > self / width ? self : from;
      },
      "__shfl_xor_sync", here);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, FASTLORA_EMULATED_HERE) {
  return ::fastlora::emulator::shuffle(
      mask, value,
      [=](int self) { return self % width + int(delta) < width ? self + int(delta) : self; },
      "__shfl_down_sync", here);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, FASTLORA_EMULATED_HERE) {
  return ::fastlora::emulator::shuffle(
      mask, value, [=](int self) { return self % width >= int(delta) ? self - int(delta) : self; },
      "__shfl_up_sync", here);
}

// --- atomics: fibres run one at a time -----------------------------------------------------------

namespace fastlora::emulator {
template <class T, class F>
T atomic(T* at, F change, Here here) {
  writable(at, 1, alignof(T), here);
  const T old = *at;
  *at = change(old);
  return old;
}
}  // namespace fastlora::emulator

#define FASTLORA_EMULATED_ATOMIC(name, expression)                                       \
  template <class T>                                                                     \
  T name(T* at, T value, FASTLORA_EMULATED_HERE) {                                       \
    return ::fastlora::emulator::atomic(at, [=](T old) { return T(expression); }, here); \
  }
FASTLORA_EMULATED_ATOMIC(atomicAdd, old + value)
FASTLORA_EMULATED_ATOMIC(atomicSub, old - value)
FASTLORA_EMULATED_ATOMIC(atomicMax, old < value ? value : old)
FASTLORA_EMULATED_ATOMIC(atomicMin, value < old ? value : old)
FASTLORA_EMULATED_ATOMIC(atomicAnd, old& value)
FASTLORA_EMULATED_ATOMIC(atomicOr, old | value)
FASTLORA_EMULATED_ATOMIC(atomicXor, old ^ value)
FASTLORA_EMULATED_ATOMIC(atomicExch, (void(old), value))
#undef FASTLORA_EMULATED_ATOMIC
template <class T>
T atomicCAS(T* at, T compare, T value, FASTLORA_EMULATED_HERE) {
  return ::fastlora::emulator::atomic(
      at, [=](T old) { return old == compare ? value : old; }, here);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// --- arithmetic and memory -----------------------------------------------------------------------

inline float __int_as_float(int bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline float __uint_as_float(unsigned bits) { return __int_as_float(int(bits)); }
inline int __float_as_int(float f) {
  int bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}
inline unsigned __float_as_uint(float f) { return unsigned(__float_as_int(f)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <class T>
T __ldg(const T* at, FASTLORA_EMULATED_HERE) {
  return *::fastlora::emulator::readable(at, 1, alignof(T), here);
}
// What is read or written once only: the same here.
template <class T>
T __ldcs(const T* at, FASTLORA_EMULATED_HERE) {
  return *::fastlora::emulator::readable(at, 1, alignof(T), here);
}
template <class T>
void __stcs(T* at, T value, FASTLORA_EMULATED_HERE) {
  *::fastlora::emulator::writable(at, 1, alignof(T), here) = value;
}
