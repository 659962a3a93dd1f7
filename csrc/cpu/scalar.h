// Element types of the CPU loops: branch-free conversions that the compiler's vectoriser can use.
// Everything is static and lives in the namespace of the instruction set (see isa.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace fastlora {
namespace FASTLORA_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

static inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
static inline uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

static inline float load(const float* p) { return *p; }
static inline double load(const double* p) { return *p; }
static inline float load(const BFloat16* p) { return as_float(uint32_t(p->bits) << 16); }
static inline float load(const Half* p) {
  const uint32_t h = p->bits;
  const uint32_t sign = (h & 0x8000u) << 16;
  // Shifting the magnitude into place and scaling by 2^112 rebiases normals and subnormals alike.
  const float magnitude = as_float((h & 0x7fffu) << 13) * as_float(0x77800000u);
  const uint32_t special = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;  // inf and NaN
  return as_float(as_bits(magnitude) | special | sign);
}

static inline void store(float* p, float v) { *p = v; }
static inline void store(double* p, double v) { *p = v; }
static inline void store(BFloat16* p, float v) {
  const uint32_t bits = as_bits(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  const uint32_t quiet = (bits >> 16) | 0x40u;
  p->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
static inline void store(Half* p, float v) {
  const uint32_t bits = as_bits(v);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal range: rebias and round to nearest even by an integer addition.
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude + 0xc8000fffu + odd) >> 13;
  // Subnormal range (below 2^-14): adding 0.5 lets the float unit do the rounding.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;  // 65520 and above round to infinity
  h = magnitude > 0x7f800000u ? 0x7e00u : h;   // NaN
  p->bits = uint16_t(sign | h);
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

// Calls `f(T{})` with the C++ type of a floating dtype; the dtype was checked by the operator.
#define FASTLORA_FLOAT_TYPES(dtype, T, ...) \
  switch (dtype) {                          \
    case ::fastlora::DType::kFloat32: {     \
      using T = float;                      \
      __VA_ARGS__;                          \
    } break;                                \
    case ::fastlora::DType::kFloat64: {     \
      using T = double;                     \
      __VA_ARGS__;                          \
    } break;                                \
    case ::fastlora::DType::kFloat16: {     \
      using T = Half;                       \
      __VA_ARGS__;                          \
    } break;                                \
    case ::fastlora::DType::kBFloat16: {    \
      using T = BFloat16;                   \
      __VA_ARGS__;                          \
    } break;                                \
    default: break;                         \
  }
