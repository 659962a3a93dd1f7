// The matrix instructions of a warpgroup of sm_90a, each wrapper beside its emulated twin, as in
// ptx.cuh. PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"; `.cu` files only.
#pragma once

#include "ptx.cuh"

#ifdef FASTLORA_EMULATED
#include "emulator/wgmma.h"
#endif

namespace fastlora {

// What other architectures compile to: nothing calls it there (has_warpgroup_products).
#if defined(FASTLORA_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTLORA_SM90A 1
#else
#define FASTLORA_SM90A 0
#endif

constexpr int kSwizzleBytes = 1024;  // what an operand in shared memory is aligned to

// An operand in shared memory whose 128-byte rows, eight of which make 1024 bytes, have their
// 16-byte groups permuted: group g of row r lies at g ^ (r & 7).
//   k-major: a row is 64 k of one row of A or column of B; `stride` bytes are between eight of them
//     and the next eight, `leading` is not looked at, and 16 k are 32 bytes further.
//   MN-major: a row is 64 neighbours in A's rows or B's columns at one k; `leading` bytes are
//   between
//     them and the next 64, `stride` between eight k and the next eight.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* at, int leading, int stride,
                                                      Here here = Here::current()) {
#ifdef FASTLORA_EMULATED
  const uint32_t address = emulator::block().shared_address(at, here);
#else
  const uint32_t address = shared_address(at);
#endif
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

// The descriptor of what lies `bytes` further.
__device__ __forceinline__ uint64_t further(uint64_t descriptor, int bytes) {
  return descriptor + uint64_t(bytes >> 4);
}

// What this thread has written to shared memory, by copies that it has waited for as well, can be
// read by wgmma (after a barrier, by that of others).
__device__ __forceinline__ void fence_proxy_async() {
#if defined(FASTLORA_EMULATED)
  emulator::block().fence_proxy();
#elif FASTLORA_SM90A
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before the first wgmma, and between what writes its registers and the wgmma that uses them.
__device__ __forceinline__ void wgmma_fence() {
#if defined(FASTLORA_EMULATED)
  emulator::block().fence_registers();
#elif FASTLORA_SM90A
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Makes a group of the wgmmas since the last one.
__device__ __forceinline__ void wgmma_commit() {
#if defined(FASTLORA_EMULATED)
  emulator::block().commit_products();
#elif FASTLORA_SM90A
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until all but the last kGroups groups have finished: only then may their accumulators be touched,
// and what they read be overwritten.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait(Here here = Here::current()) {
#if defined(FASTLORA_EMULATED)
  emulator::block().wait_products(kGroups, here);
#elif FASTLORA_SM90A
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#endif
}

// The compiler knows nothing of accumulators between a wgmma and its wait: after the wait this
// keeps it from having read them earlier.
template <int kCount>
__device__ __forceinline__ void keep_in_order([[maybe_unused]] float (&sum)[kCount]) {
#ifndef FASTLORA_EMULATED
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sum[i])::"memory");
#endif
}

// `times` strides of `bytes` after p, by one instruction: what the compiler makes of a sum for each
// of many copies takes longer than the copies.
template <class T>
__device__ __forceinline__ const T* strides_after(const T* p, int32_t bytes, int times) {
#ifdef FASTLORA_EMULATED
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + int64_t(bytes) * times);
#else
  const T* to;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(to) : "r"(bytes), "r"(times), "l"(p));
  return to;
#endif
}

// Registers of this thread from now on: warps that need few leave the others more. The whole
// warpgroup says so.
template <int kRegisters>
__device__ __forceinline__ void leave_registers() {
#if !defined(FASTLORA_EMULATED) && FASTLORA_SM90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#if !defined(FASTLORA_EMULATED) && FASTLORA_SM90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

#define FASTLORA_SUMS_256                                                                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "    \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "     \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "     \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "     \
  "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "     \
  "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, " \
  "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, "      \
  "%118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
#define FASTLORA_SUMS_128                                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "  \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "  \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "

// clang-format off
#define FASTLORA_EIGHT(i)                                                             \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), \
      "+f"(sum[i + 5]), "+f"(sum[i + 6]), "+f"(sum[i + 7])
// clang-format on
#define FASTLORA_64(i)                                                                      \
  FASTLORA_EIGHT(i), FASTLORA_EIGHT(i + 8), FASTLORA_EIGHT(i + 16), FASTLORA_EIGHT(i + 24), \
      FASTLORA_EIGHT(i + 32), FASTLORA_EIGHT(i + 40), FASTLORA_EIGHT(i + 48),               \
      FASTLORA_EIGHT(i + 56)

// A in registers (operands count .. count + 3), and in shared memory.
#define FASTLORA_WGMMA_RS(columns, type, a0, a1, a2, a3, at_b, at_add, at_mn, ...)         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " at_add                                  \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type \
               " " FASTLORA_SUMS_##columns "{" a0 ", " a1 ", " a2 ", " a3 "}, " at_b       \
                                           ", p, 1, 1, " at_mn ";\n}\n"                    \
               : __VA_ARGS__                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)),        \
                 "n"(int(kMnMajor)))
#define FASTLORA_WGMMA_SS(columns, type, at_a, at_b, at_add, at_mn, ...)                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " at_add                                  \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type \
               " " FASTLORA_SUMS_##columns at_a ", " at_b ", p, 1, 1, 0, " at_mn ";\n}\n"  \
               : __VA_ARGS__                                                               \
               : "l"(a), "l"(b), "r"(int(add)), "n"(int(kMnMajor)))

// sum = A B, + sum with `add`: 64 x 16 by 16 x kColumns, by the four warps of a warpgroup. Warp w
// has rows 16 (w % 4) and on; sum[4 j .. 4 j + 3] are to columns 8 j .. 8 j + 7 what multiply's
// are, and A's registers are multiply's; T is __half or __nv_bfloat16. B lies in shared memory.
template <class T, bool kMnMajor, int kSums>
__device__ __forceinline__ void wgmma(float (&sum)[kSums], const uint32_t (&a)[4], uint64_t b,
                                      bool add, Here here = Here::current()) {
  constexpr int kColumns = 2 * kSums;
  static_assert(kColumns == 128 || kColumns == 256, "what is spelt out here");
#if defined(FASTLORA_EMULATED)
  emulator::wgmma<T>({sum, a, 0, b, add}, kColumns, kMnMajor, here);
#elif FASTLORA_SM90A
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (kColumns == 256 && kHalf)
    FASTLORA_WGMMA_RS(256, "f16", "%128", "%129", "%130", "%131", "%132", "%133", "%134",
                      FASTLORA_64(0), FASTLORA_64(64));
  else if constexpr (kColumns == 256)
    FASTLORA_WGMMA_RS(256, "bf16", "%128", "%129", "%130", "%131", "%132", "%133", "%134",
                      FASTLORA_64(0), FASTLORA_64(64));
  else if constexpr (kHalf)
    FASTLORA_WGMMA_RS(128, "f16", "%64", "%65", "%66", "%67", "%68", "%69", "%70", FASTLORA_64(0));
  else
    FASTLORA_WGMMA_RS(128, "bf16", "%64", "%65", "%66", "%67", "%68", "%69", "%70", FASTLORA_64(0));
#endif
}

// The same with A in shared memory, k-major.
template <class T, bool kMnMajor, int kSums>
__device__ __forceinline__ void wgmma(float (&sum)[kSums], uint64_t a, uint64_t b, bool add,
                                      Here here = Here::current()) {
  constexpr int kColumns = 2 * kSums;
  static_assert(kColumns == 128 || kColumns == 256, "what is spelt out here");
#if defined(FASTLORA_EMULATED)
  emulator::wgmma<T>({sum, nullptr, a, b, add}, kColumns, kMnMajor, here);
#elif FASTLORA_SM90A
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (kColumns == 256 && kHalf)
    FASTLORA_WGMMA_SS(256, "f16", "%128", "%129", "%130", "%131", FASTLORA_64(0), FASTLORA_64(64));
  else if constexpr (kColumns == 256)
    FASTLORA_WGMMA_SS(256, "bf16", "%128", "%129", "%130", "%131", FASTLORA_64(0), FASTLORA_64(64));
  else if constexpr (kHalf)
    FASTLORA_WGMMA_SS(128, "f16", "%64", "%65", "%66", "%67", FASTLORA_64(0));
  else
    FASTLORA_WGMMA_SS(128, "bf16", "%64", "%65", "%66", "%67", FASTLORA_64(0));
#endif
}

#undef FASTLORA_SUMS_256
#undef FASTLORA_SUMS_128
#undef FASTLORA_EIGHT
#undef FASTLORA_64
#undef FASTLORA_WGMMA_RS
#undef FASTLORA_WGMMA_SS

}  // namespace fastlora
