// Element types of the kernels: loads and stores of eight elements at a time, 16-byte accesses
// where the memory allows them, single ones otherwise; arithmetic in float. Included by .cu files
// only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "device.cuh"

namespace fastlora {

constexpr int kWidth = 8;  // elements that one thread handles at a time

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ void narrow(float v, float* out) { *out = v; }
__device__ __forceinline__ void narrow(float v, __half* out) { *out = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(v);
}

template <class T>
union alignas(16) Packet {
  T elements[16 / sizeof(T)];
  uint4 bits;
  __device__ Packet() {}
};

// `vectors`: all kWidth elements exist and `from` is 16-byte aligned; otherwise `count` of them
// exist.
template <class T>
__device__ __forceinline__ void load(const T* from, bool vectors, int count, float* to,
                                     Here here = Here::current()) {
  constexpr int kPacket = 16 / sizeof(T);
  if (vectors) {
    readable(from, kWidth, 16, here);
#pragma unroll
    for (int k = 0; k < kWidth; k += kPacket) {
      Packet<T> packet;
      packet.bits = *reinterpret_cast<const uint4*>(from + k);
#pragma unroll
      for (int i = 0; i < kPacket; ++i) to[k + i] = widen(packet.elements[i]);
    }
    return;
  }
  if (count > 0) readable(from, count, alignof(T), here);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) to[i] = i < count ? widen(from[i]) : 0.0f;
}

template <class T>
__device__ __forceinline__ void store(T* to, bool vectors, int count, const float* from,
                                      Here here = Here::current()) {
  constexpr int kPacket = 16 / sizeof(T);
  if (vectors) {
    writable(to, kWidth, 16, here);
#pragma unroll
    for (int k = 0; k < kWidth; k += kPacket) {
      Packet<T> packet;
#pragma unroll
      for (int i = 0; i < kPacket; ++i) narrow(from[k + i], &packet.elements[i]);
      *reinterpret_cast<uint4*>(to + k) = packet.bits;
    }
    return;
  }
  if (count > 0) writable(to, count, alignof(T), here);
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (i < count) narrow(from[i], to + i);
}

// The same for any address and for elements `stride` apart.
template <class T>
__device__ __forceinline__ void load_strided(const T* from, int64_t stride, int count, float* to,
                                             Here here = Here::current()) {
  const bool vectors =
      stride == 1 && count >= kWidth && reinterpret_cast<uintptr_t>(from) % 16 == 0;
  if (stride == 1) return load(from, vectors, count, to, here);
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    to[i] = i < count ? widen(*readable(from + i * stride, 1, alignof(T), here)) : 0.0f;
}

template <class T>
__device__ __forceinline__ void store_strided(T* to, int64_t stride, int count, const float* from,
                                              Here here = Here::current()) {
  const bool vectors = stride == 1 && count >= kWidth && reinterpret_cast<uintptr_t>(to) % 16 == 0;
  if (stride == 1) return store(to, vectors, count, from, here);
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (i < count) narrow(from[i], writable(to + i * stride, 1, alignof(T), here));
}

// Eight 16-bit elements as they lie in memory, zeros beyond `count`.
template <class T>
__device__ __forceinline__ Packet<T> load_packet(const T* from, int64_t stride, int count,
                                                 Here here = Here::current()) {
  static_assert(sizeof(T) == 2, "eight of them are a packet");
  Packet<T> packet;
  if (stride == 1 && count >= kWidth && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    packet.bits = *reinterpret_cast<const uint4*>(readable(from, kWidth, 16, here));
    return packet;
  }
  packet.bits = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (i < count) packet.elements[i] = *readable(from + i * stride, 1, alignof(T), here);
  return packet;
}

// The way back, for what nobody reads soon: past the caches where whole packets fit.
template <class T>
__device__ __forceinline__ void store_packet(T* to, int64_t stride, int count,
                                             const Packet<T>& packet, Here here = Here::current()) {
  if (stride == 1 && count >= kWidth && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    writable(to, kWidth, 16, here);
    __stcs(reinterpret_cast<uint4*>(to), packet.bits);
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (i < count) *writable(to + i * stride, 1, alignof(T), here) = packet.elements[i];
}

__host__ __device__ __forceinline__ bool aligned16(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

}  // namespace fastlora
