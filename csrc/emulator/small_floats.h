// Conversions of 16-bit floats, to nearest even, as the GPU does them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastlora::emulator {

inline uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline float float_of_bfloat16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }
inline uint16_t bfloat16_of_float(float v) {
  const uint32_t bits = bits_of(v);
  if (std::isnan(v)) return 0x7fff;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float float_of_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? float_of(0x7fffffff) : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(float(fraction), -24);
  return sign * std::ldexp(float(fraction + 1024), exponent - 25);
}
inline uint16_t half_of_float(float v) {
  if (std::isnan(v)) return 0x7fff;
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const double magnitude = std::fabs(double(v));
  if (magnitude == 0) return sign;
  if (magnitude >= 65520) return sign | 0x7c00;  // half way from the largest to the next, or beyond
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;         // of the last place
  const double units = std::nearbyint(std::ldexp(magnitude, -unit));  // ties to even
  // In the subnormal range the units are the bits; above, each doubling adds 1024 of them.
  return sign | uint16_t(units + 1024.0 * (unit + 24));
}

}  // namespace fastlora::emulator
