// The noisy sample and its target in one pass; noise from memory or from the sample's seed.
#include "../add_noise.h"

#include "../philox.h"
#include "scalar.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

constexpr int64_t kChunk = 1024;  // elements of one sample; a multiple of Philox's 4
constexpr int64_t kElementsPerParallel = 1 << 16;  // fewer than this are faster on one thread

template <class A>
static inline A element(const void* data, DType dtype, int64_t i) {
  return dtype == DType::kFloat64 ? A(static_cast<const double*>(data)[i])
                                  : A(static_cast<const float*>(data)[i]);
}

template <class T>
static void run(const AddNoise& p) {
  using A = Acc<T>;
  const int64_t chunks = (p.inner + kChunk - 1) / kChunk;  // of one sample
  const int64_t total = p.batch * chunks;
#pragma omp parallel for schedule(static) if (p.batch * p.inner >= kElementsPerParallel)
  for (int64_t task = 0; task < total; ++task) {
    const int64_t sample = task / chunks, first = task % chunks * kChunk;
    const int64_t count = p.inner - first < kChunk ? p.inner - first : kChunk;
    const int64_t at = sample * p.inner + first, row = p.t[sample] * 4;
    A eps[kChunk];
    if (p.noise != nullptr) {
      const T* noise = static_cast<const T*>(p.noise) + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) eps[i] = A(load(noise + i));
    } else {
      const uint64_t seed = uint64_t(p.seeds[sample]);
      for (int64_t i = 0; i < (count + 3) / 4; ++i)
        philox::normals(seed, uint64_t(philox::kStart), uint64_t(first / 4 + i), eps + 4 * i);
    }
    const A alpha = element<A>(p.table, p.table_dtype, row + 0);
    const A sigma = element<A>(p.table, p.table_dtype, row + 1);
    const A p_0 = element<A>(p.table, p.table_dtype, row + 2);
    const A p_e = element<A>(p.table, p.table_dtype, row + 3);
    const T* x0 = static_cast<const T*>(p.x0) + at;
    T* __restrict x_t = static_cast<T*>(p.x_t) + at;
    T* __restrict target = static_cast<T*>(p.target) + at;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const A clean = A(load(x0 + i));
      store(x_t + i, alpha * clean + sigma * eps[i]);
      store(target + i, p_0 * clean + p_e * eps[i]);
    }
  }
}

}  // namespace

void add_noise_loop(const AddNoise& p) { FASTLORA_FLOAT_TYPES(p.dtype, T, run<T>(p)); }

}  // namespace FASTLORA_ISA
}  // namespace fastlora
