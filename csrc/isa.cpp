#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace fastlora {
namespace {

Isa best() {
#if FASTLORA_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

// FASTLORA_CPU_ISA=baseline|avx2|avx512 lowers the choice (for tests and comparisons), never raises
// it.
Isa choose() {
  const Isa limit = best();
  const char* name = std::getenv("FASTLORA_CPU_ISA");
  if (name == nullptr) return limit;
  Isa wanted = limit;
  if (std::strcmp(name, "baseline") == 0) wanted = Isa::kBaseline;
  if (std::strcmp(name, "avx2") == 0) wanted = Isa::kAvx2;
  return static_cast<int>(wanted) < static_cast<int>(limit) ? wanted : limit;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace fastlora
