// All inline PTX, each wrapper beside what it does on the emulator. Instructions of sm_80 and
// newer;
// `.cu` files only. Fragment layouts: PTX ISA, "Matrix fragments for mma.m16n8k16" and the like;
// tests/emulator checks them register by register.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "device.cuh"
#include "types.cuh"

#ifdef FASTLORA_EMULATED
#include "emulator/matrix.h"
#endif

namespace fastlora {

// What kernels for older GPUs (sm_75) compile to: nothing calls it there.
#if defined(FASTLORA_EMULATED) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define FASTLORA_SM80 1
#else
#define FASTLORA_SM80 0
#endif

#ifndef FASTLORA_EMULATED
// The address that shared-memory instructions take.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// --- asynchronous copies from global to shared memory --------------------------------------------

// kBytes (4, 8 or 16) at addresses that are multiples of it; beyond the first `valid` bytes, which
// alone are read, zeros. Nobody may look before wait_copies and a barrier.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, int valid = kBytes,
                                           Here here = Here::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async copies");
#if defined(FASTLORA_EMULATED)
  emulator::block().copy_async({static_cast<char*>(to), static_cast<const char*>(from), kBytes,
                                static_cast<size_t>(valid), here});
#elif FASTLORA_SM80
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(from), "n"(kBytes), "r"(valid)
                 : "memory");
#endif
}

// Makes a group of the copies since the last one.
__device__ __forceinline__ void commit_copies() {
#if defined(FASTLORA_EMULATED)
  emulator::block().commit_copies();
#elif FASTLORA_SM80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but the last kGroups groups of this thread are there.
template <int kGroups>
__device__ __forceinline__ void wait_copies() {
#if defined(FASTLORA_EMULATED)
  emulator::block().wait_copies(kGroups);
#elif FASTLORA_SM80
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// --- named barriers ------------------------------------------------------------------------------

// Barrier `id` (1 to 15; 0 is __syncthreads) of `threads` threads, whole warps: arrive and wait.
__device__ __forceinline__ void barrier_sync(int id, int threads, Here here = Here::current()) {
#ifdef FASTLORA_EMULATED
  emulator::block().barrier(id, static_cast<unsigned>(threads), true, here);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Arrives without waiting.
__device__ __forceinline__ void barrier_arrive(int id, int threads, Here here = Here::current()) {
#ifdef FASTLORA_EMULATED
  emulator::block().barrier(id, static_cast<unsigned>(threads), false, here);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// The same number, of which the compiler knows nothing: what it looks up with it is looked up again
// instead of being kept in registers.
__device__ __forceinline__ int32_t opaque(int32_t v) {
#ifndef FASTLORA_EMULATED
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// Brings the 128 bytes around `p` towards the chip; nothing waits for them. Only memory that
// exists.
__device__ __forceinline__ void prefetch(const void* p) {
#if defined(FASTLORA_EMULATED)
  readable(static_cast<const char*>(p));
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// --- matrices in the registers of a warp ---------------------------------------------------------

// Two numbers as one register of a fragment, each rounded to nearest; T is __half or __nv_bfloat16.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#if !defined(FASTLORA_EMULATED) && FASTLORA_SM80
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  Packet<T> packet;
  narrow(low, &packet.elements[0]);
  narrow(high, &packet.elements[1]);
  return packet.bits.x;
#endif
}

// The way back.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  Packet<T> packet;
  packet.bits.x = bits;
  return make_float2(widen(packet.elements[0]), widen(packet.elements[1]));
}

// Where the 16-byte group `group` of row `row` lies, in a matrix of 64-byte rows whose groups are
// permuted so that neither copies nor matrix loads meet in a bank.
__device__ __forceinline__ char* place(char* matrix, int row, int group) {
  return matrix + row * 64 + ((group ^ (row >> 1 & 3)) << 4);
}

// kCount (1, 2 or 4) 8x8 matrices of 16-bit elements: lane 8 i + r gives the address of row r of
// matrix i, every lane gets two neighbours of one row of each matrix (kTransposed: of one column).
template <int kCount, bool kTransposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[kCount], const void* row,
                                              Here here = Here::current()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "what ldmatrix loads");
#ifdef FASTLORA_EMULATED
  emulator::load_matrices(to, kCount, kTransposed, row, here);
#else
  const uint32_t at = shared_address(row);
  if constexpr (kCount == 1 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(to[0])
                 : "r"(at)
                 : "memory");
  else if constexpr (kCount == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(to[0])
                 : "r"(at)
                 : "memory");
  else if constexpr (kCount == 2 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(at)
                 : "memory");
  else if constexpr (kCount == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(at)
                 : "memory");
  else if constexpr (!kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
#endif
}

// The way back (stmatrix, sm_90 and newer).
template <int kCount, bool kTransposed = false>
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&from)[kCount],
                                               Here here = Here::current()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "what stmatrix stores");
#if defined(FASTLORA_EMULATED)
  emulator::store_matrices(row, kCount, kTransposed, from, here);
#elif __CUDA_ARCH__ >= 900
  const uint32_t at = shared_address(row);
  if constexpr (kCount == 1 && !kTransposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(at), "r"(from[0])
                 : "memory");
  else if constexpr (kCount == 1)
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(at),
                 "r"(from[0])
                 : "memory");
  else if constexpr (kCount == 2 && !kTransposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(from[0]),
                 "r"(from[1])
                 : "memory");
  else if constexpr (kCount == 2)
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at),
                 "r"(from[0]), "r"(from[1])
                 : "memory");
  else if constexpr (!kTransposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
#else
  asm volatile("trap;");
#endif
}

// sum += a · b, 16x16 by 16x8, in float; T is __half or __nv_bfloat16, a and b hold two each
// register.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2], Here here = Here::current()) {
#if defined(FASTLORA_EMULATED)
  emulator::multiply_16<T>(sum, a, b, here);
#elif FASTLORA_SM80
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// sum += a · b, 16x8 by 8x8; a and b hold tf32 (to_tf32), one each register.
__device__ __forceinline__ void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2], Here here = Here::current()) {
#if defined(FASTLORA_EMULATED)
  emulator::multiply_tf32(sum, a, b, here);
#elif FASTLORA_SM80
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The nearest number with ten bits after the point, ties away from zero; the other bits are zero.
__device__ __forceinline__ uint32_t to_tf32(float v) {
#if defined(FASTLORA_EMULATED)
  return emulator::tf32_of_float(v);
#elif FASTLORA_SM80
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
#else
  return __float_as_uint(v);
#endif
}

// --- kernels that follow each other --------------------------------------------------------------

// In a kernel that launch_dependent started: until the one before it has finished and what it wrote
// can be read. Nothing elsewhere.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(FASTLORA_EMULATED)
  emulator::block().wait_previous_kernel();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start, once every block has said so or ended.
__device__ __forceinline__ void let_next_kernel_start() {
#if !defined(FASTLORA_EMULATED) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace fastlora
