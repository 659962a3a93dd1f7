// The CPU loops (csrc/cpu/*.cpp) are compiled once per instruction set into namespaces of their
// own, and the best one that this machine has is picked at run time, so one wheel runs on any
// x86-64; on other architectures (Arm: NEON is part of the baseline) only `baseline` exists.
//
// Files in csrc/cpu must not instantiate templates or inline functions of the standard library: the
// linker would keep one copy for all, perhaps the AVX-512 one.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FASTLORA_X86 1
#else
#define FASTLORA_X86 0
#endif

#ifndef FASTLORA_ISA
#define FASTLORA_ISA baseline
#endif

namespace fastlora {

template <class... Arguments>
void unreachable(const Arguments&...) {}

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best instruction set of this machine, or the one that FASTLORA_CPU_ISA names.
Isa isa();
const char* isa_name();

}  // namespace fastlora

// Declares a loop `void name(args)` in every namespace.
#ifdef FASTLORA_EMULATED  // a build for GPUs alone
#define FASTLORA_DECLARE_CPU(name, ...)
#define FASTLORA_CPU_CALL(name, ...) ::fastlora::unreachable(__VA_ARGS__)
#elif FASTLORA_X86
#define FASTLORA_DECLARE_CPU(name, ...) \
  namespace fastlora::baseline {        \
  void name(__VA_ARGS__);               \
  }                                     \
  namespace fastlora::avx2 {            \
  void name(__VA_ARGS__);               \
  }                                     \
  namespace fastlora::avx512 {          \
  void name(__VA_ARGS__);               \
  }
#define FASTLORA_CPU_CALL(name, ...)                                                     \
  (::fastlora::isa() == ::fastlora::Isa::kAvx512 ? ::fastlora::avx512::name(__VA_ARGS__) \
   : ::fastlora::isa() == ::fastlora::Isa::kAvx2 ? ::fastlora::avx2::name(__VA_ARGS__)   \
                                                 : ::fastlora::baseline::name(__VA_ARGS__))
#else
#define FASTLORA_DECLARE_CPU(name, ...) \
  namespace fastlora::baseline {        \
  void name(__VA_ARGS__);               \
  }
#define FASTLORA_CPU_CALL(name, ...) ::fastlora::baseline::name(__VA_ARGS__)
#endif
