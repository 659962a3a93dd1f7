// __half for a host compiler, with the conversions that kernels use.
#pragma once

#include "../small_floats.h"

struct alignas(2) __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline float __half2float(__half v) { return fastlora::emulator::float_of_half(v.bits); }
inline __half __float2half_rn(float v) { return {fastlora::emulator::half_of_float(v)}; }
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
