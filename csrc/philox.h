// Philox4x32-10 (Salmon et al., 2011) and Box-Muller: standard normals as a function of (seed,
// step, element), for host and device alike. fastlora/ops/_philox.py is the reference and explains
// the layout.
//
// Branch-free arithmetic on 32-bit words, so that a loop over blocks vectorises. Functions are
// static: the CPU loops are compiled once per instruction set and must not share one copy.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTLORA_HOST_DEVICE static __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FASTLORA_HOST_DEVICE static inline __attribute__((always_inline))
#else
#define FASTLORA_HOST_DEVICE static inline
#endif

namespace fastlora::philox {

constexpr int64_t kStart = -1;  // the step of noise that is not a solver's: initial x, training

struct Words {
  uint32_t w[4];
};

// Four words for the counter (block, step), both 64 bits, under the key `seed`.
FASTLORA_HOST_DEVICE Words words(uint64_t seed, uint64_t step, uint64_t block) {
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32);
  uint32_t c2 = uint32_t(step), c3 = uint32_t(step >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0;
    const uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A float32 in (0, 1]: exact up to the one rounding of the conversion, which every execution
// shares.
FASTLORA_HOST_DEVICE float uniform(uint32_t r) {
  return float(int32_t(r >> 1)) * 0x1p-31f + 0x1p-32f;
}

FASTLORA_HOST_DEVICE float from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
FASTLORA_HOST_DEVICE uint32_t to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}

// log of a normal float in (0, 1]: u = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh(s),
// s = (m - 1)/(m + 1), |s| < 0.172, five terms of the series: relative error 2e-9 before rounding.
FASTLORA_HOST_DEVICE float log_of(float u) {
  const uint32_t shifted = to_bits(u) - 0x3f3504f3u;  // sqrt(1/2)
  const int32_t e = int32_t(shifted) >> 23;
  const float m = from_bits((shifted & 0x007fffffu) + 0x3f3504f3u);
  const float s = (m - 1.0f) / (m + 1.0f);
  const float s2 = s * s;
  const float series = s2 * (1.0f / 3 + s2 * (1.0f / 5 + s2 * (1.0f / 7 + s2 * (1.0f / 9))));
  const float log_m = 2.0f * s + 2.0f * s * series;
  return float(e) * 0.693145752f + (float(e) * 1.42860677e-6f + log_m);  // ln 2 in two parts
}

// z0 = R cos a, z1 = R sin a for R = sqrt(-2 log u(r)), a = pi 2^-31 int32(turn). The quadrant is
// taken off in integers, so the angle has no rounding error worth the name.
FASTLORA_HOST_DEVICE void normal_pair(uint32_t r, uint32_t turn, float* z0, float* z1) {
  const float radius = sqrtf(-2.0f * log_of(uniform(r)));
  const uint32_t quadrant = (turn + 0x20000000u) >> 30;
  const int32_t rest = int32_t(turn - (quadrant << 30));  // [-2^29, 2^29): [-pi/4, pi/4)
  const float t = float(rest) * 1.46291808e-9f;           // pi 2^-31
  const float t2 = t * t;
  const float sine =
      t + t * t2 * (-1.0f / 6 + t2 * (1.0f / 120 + t2 * (-1.0f / 5040 + t2 / 362880)));
  const float cosine =
      1.0f -
      t2 * (0.5f - t2 * (1.0f / 24 - t2 * (1.0f / 720 - t2 * (1.0f / 40320 - t2 / 3628800))));
  const uint32_t swap = 0u - (quadrant & 1u);  // a mask: a branch would not vectorise
  const uint32_t crossed = (to_bits(sine) ^ to_bits(cosine)) & swap;
  const uint32_t cos_sign = ((quadrant + 1u) & 2u) << 30;  // negative in quadrants 1 and 2
  const uint32_t sin_sign = (quadrant & 2u) << 30;         // negative in quadrants 2 and 3
  *z0 = radius * from_bits(to_bits(cosine) ^ crossed ^ cos_sign);
  *z1 = radius * from_bits(to_bits(sine) ^ crossed ^ sin_sign);
}

FASTLORA_HOST_DEVICE void normal_pair(uint32_t r, uint32_t turn, double* z0, double* z1) {
  const double radius = sqrt(-2.0 * log(double(uniform(r))));
  const double angle = double(int32_t(turn)) * (3.14159265358979323846 * 0x1p-31);
  *z0 = radius * cos(angle);
  *z1 = radius * sin(angle);
}

// The normals of elements 4 block .. 4 block + 3.
template <class A>
FASTLORA_HOST_DEVICE void normals(uint64_t seed, uint64_t step, uint64_t block, A* z) {
  const Words r = words(seed, step, block);
  normal_pair(r.w[0], r.w[1], z + 0, z + 1);
  normal_pair(r.w[2], r.w[3], z + 2, z + 3);
}

}  // namespace fastlora::philox
