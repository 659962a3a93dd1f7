// What a sampler step has to know of a whole sample before it can begin: the standard deviations
// that rescale guidance, and the quantile of |x0| where dynamic thresholding cuts. Every sum has
// one order, that of chunks within a sample, so neither threads nor the rest of the batch change
// bits.
#include <math.h>
#include <string.h>

#include "../sampler_step.h"
#include "sampler_row.h"
#include "scalar.h"
#include "vector.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

// --- standard deviation
// ---------------------------------------------------------------------------

// sums[0] and sums[1] of v - shift and of its square, over `count` elements.
template <class X>
static inline void shifted_sums(const X* v, int64_t count, X shift, double* sums) {
  constexpr int kLanes = kVectorBytes / sizeof(X), kVectors = 4;
  Vector<X> first[kVectors] = {}, second[kVectors] = {};
  const Vector<X> shifts = shift - Vector<X>{};
  int64_t i = 0;
  for (; i + kLanes * kVectors <= count; i += kLanes * kVectors)
    for (int k = 0; k < kVectors; ++k) {
      const Vector<X> d = load_vector(v + i + k * kLanes) - shifts;
      first[k] += d;
      second[k] += d * d;
    }
  sums[0] = sums[1] = 0;
  for (int k = 0; k < kVectors; ++k)
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[0] += double(first[k][lane]);
      sums[1] += double(second[k][lane]);
    }
  for (; i < count; ++i) {
    const double d = double(v[i]) - double(shift);
    sums[0] += d;
    sums[1] += d * d;
  }
}

struct Moments {
  double count, mean, deviations;  // the sum of squared deviations from the mean
};

// About the mean rather than about zero: nothing cancels where the mean is far above the deviation.
template <class X>
static inline Moments moments(const X* v, int64_t count) {
  const double n = double(count);
  double sums[2];
  shifted_sums(v, count, X(0), sums);
  const X shift = X(sums[0] / n);
  shifted_sums(v, count, shift, sums);
  return {n, double(shift) + sums[0] / n, sums[1] - sums[0] * sums[0] / n};
}

// Of two parts together (Chan, Golub, LeVeque, 1979).
static inline Moments merged(const Moments& a, const Moments& b) {
  const double n = a.count + b.count, delta = b.mean - a.mean;
  return {n, a.mean + delta * (b.count / n),
          a.deviations + b.deviations + delta * delta * (a.count * b.count / n)};
}

static inline int64_t count_of(const SamplerStep& p, int64_t first) {
  return p.inner - first < kChunk ? p.inner - first : kChunk;
}

// Unbiased, over a sample; `moments` [chunks, 4] of this tensor.
static inline double deviation(const SamplerStep& p, const double* moments, int64_t chunks) {
  Moments all{double(count_of(p, 0)), moments[0], moments[1]};
  for (int64_t c = 1; c < chunks; ++c)
    all = merged(all, {double(count_of(p, c * kChunk)), moments[4 * c], moments[4 * c + 1]});
  return sqrt(all.deviations / (all.count - 1));
}

template <class X, class E>
static inline void chunk_moments(const SamplerStep& p, const Row<X>& r, int64_t sample,
                                 int64_t first, double* out) {
  alignas(64) X e[kChunk];
  const int64_t at = sample * p.inner + first, count = count_of(p, first);
  guide<X, E>(p, r.w, at, count, e);
  const Moments guided = moments(e, count);
  const E* e0 = static_cast<const E*>(p.outputs[0]) + at;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) e[i] = X(load(e0 + i));
  const Moments conditional = moments(e, count);
  out[0] = conditional.mean;
  out[1] = conditional.deviations;
  out[2] = guided.mean;
  out[3] = guided.deviations;
}

// --- quantile
// --------------------------------------------------------------------------------------

template <class X>
struct BitsOf {
  using type = uint32_t;
  static constexpr int kBits = 31;  // without the sign
  static constexpr uint32_t kInfinity = 0x7f800000u;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
  static constexpr int kBits = 63;
  static constexpr uint64_t kInfinity = uint64_t(0x7ff) << 52;
};
template <class X>
using Bits = typename BitsOf<X>::type;

template <class X>
static inline X number(Bits<X> bits) {
  X v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// |k_x x + k_e e| as bits, which are ordered as the numbers are.
template <class T>
static inline void chunk_values(const SamplerStep& p, const Row<Acc<T>>& r, int64_t sample,
                                int64_t first, Bits<Acc<T>>* out) {
  using X = Acc<T>;
  alignas(64) X e[kChunk], wide[kChunk];
  const int64_t at = sample * p.inner + first, count = count_of(p, first);
  const X* x = widened(static_cast<const T*>(p.x) + at, count, wide);
  guided(p, r.w, sample, at, count, p.rescale != nullptr, e);
  const X k_x = r.c[kKx], k_e = r.c[kKe];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) e[i] = k_x * x[i] + k_e * e[i];
  memcpy(out + at, e, size_t(count) * sizeof(X));
  constexpr Bits<X> kMagnitude = ~Bits<X>(0) >> 1;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[at + i] &= kMagnitude;
}

constexpr int kDigit = 11;  // bits that one pass of the selection decides

// The element of that rank among n, by its leading bits, then by those behind them; `upto` gets how
// many elements are not larger.
template <class X>
static Bits<X> selected(const Bits<X>* v, int64_t n, int64_t rank, int64_t* upto) {
  Bits<X> prefix = 0;
  int64_t below = 0;
  for (int known = 0, bits = BitsOf<X>::kBits; known < bits;) {
    const int width = bits - known < kDigit ? bits - known : kDigit;
    const int shift = bits - known - width;
    const Bits<X> mask = (Bits<X>(1) << width) - 1;
    uint32_t counts[2][1 << kDigit] = {};  // neighbours are often equal: two do not wait so long
    if (known == 0) {
      int64_t i = 0;
      for (; i + 2 <= n; i += 2) {
        ++counts[0][v[i] >> shift];
        ++counts[1][v[i + 1] >> shift];
      }
      if (i < n) ++counts[0][v[i] >> shift];
    } else {
      for (int64_t i = 0; i < n; ++i)
        if (v[i] >> (shift + width) == prefix) ++counts[0][(v[i] >> shift) & mask];
    }
    int64_t digit = 0;
    for (;; ++digit) {
      const int64_t here = int64_t(counts[0][digit]) + counts[1][digit];
      if (below + here > rank) {
        *upto = below + here;
        break;
      }
      below += here;
    }
    prefix = (prefix << width) | Bits<X>(digit);
    known += width;
  }
  return prefix;
}

// Where x0 is cut: between the elements `rank` and `rank` + 1, within [1, threshold_max].
template <class X>
static X threshold(const SamplerStep& p, const Bits<X>* v) {
  const int64_t n = p.inner;
  Bits<X> largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = v[i] > largest ? v[i] : largest;
  if (largest > BitsOf<X>::kInfinity) return number<X>(largest);  // NaN
  int64_t upto = 0;
  const Bits<X> low = selected<X>(v, n, p.rank, &upto);
  Bits<X> high = low;
  if (p.rank + 1 < n && p.rank + 1 >= upto) {
    high = largest;
#pragma omp simd reduction(min : high)
    for (int64_t i = 0; i < n; ++i) {
      const Bits<X> above = v[i] > low ? v[i] : largest;
      high = above < high ? above : high;
    }
  }
  const X a = number<X>(low), b = number<X>(high);
  const X s = a + X(p.between) * (b - a), most = X(p.threshold_max);
  return s < 1 ? X(1) : s > most ? most : s;
}

// --- both
// ------------------------------------------------------------------------------------------

template <class T>
static void run(const SamplerStep& p, const SamplerScratch& scratch) {
  using X = Acc<T>;
  const int64_t chunks = (p.inner + kChunk - 1) / kChunk, total = p.batch * chunks;
  X* statistics = static_cast<X*>(p.statistics);
  Bits<X>* values = static_cast<Bits<X>*>(scratch.values);
#pragma omp parallel if (p.batch * p.inner >= kElementsPerParallel)
  {
    if (p.rescale != nullptr) {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < total; ++task) {
        const Row<X> row = row_of<X>(p, task / chunks);
        FASTLORA_FLOAT_TYPES(p.output_dtype, E,
                             chunk_moments<X, E>(p, row, task / chunks, task % chunks * kChunk,
                                                 scratch.moments + 4 * task));
      }
#pragma omp for schedule(static)
      for (int64_t sample = 0; sample < p.batch; ++sample) {
        const double* of_sample = scratch.moments + 4 * sample * chunks;
        const double ratio = deviation(p, of_sample, chunks) / deviation(p, of_sample + 2, chunks);
        const X phi = static_cast<const X*>(p.rescale)[p.rescale_batch > 1 ? sample : 0];
        statistics[2 * sample] = X(double(phi) * ratio + (1 - double(phi)));
      }
    }
    if (p.dynamic) {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < total; ++task) {
        const Row<X> row = row_of<X>(p, task / chunks);
        chunk_values<T>(p, row, task / chunks, task % chunks * kChunk, values);
      }
#pragma omp for schedule(static)
      for (int64_t sample = 0; sample < p.batch; ++sample)
        statistics[2 * sample + 1] = threshold<X>(p, values + sample * p.inner);
    }
  }
}

}  // namespace

void sampler_statistics_loop(const SamplerStep& p, const SamplerScratch& scratch) {
  FASTLORA_FLOAT_TYPES(p.x_dtype, T, run<T>(p, scratch));
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
