// __nv_bfloat16 for a host compiler, with the conversions that kernels use.
#pragma once

#include "../small_floats.h"

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  return fastlora::emulator::float_of_bfloat16(v.bits);
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  return {fastlora::emulator::bfloat16_of_float(v)};
}
inline float __low2float(__nv_bfloat162 v) { return __bfloat162float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return __bfloat162float(v.y); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
