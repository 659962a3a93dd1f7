// One step of a solver's table in one pass over memory: chunks that stay in the first-level cache
// go through guidance, the solver's sums, the mask and conversion one after the other. What a row
// does not ask for costs nothing: sums leave out columns of 0, and chunks the passes that nobody
// wants.
#include "../sampler_step.h"

#include <string.h>

#include "../philox.h"
#include "sampler_row.h"
#include "scalar.h"
#include "vector.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

// Where so much is written, nothing of it will be in a cache when it is read.
constexpr int64_t kStreamedBytes = 16 << 20;
constexpr int kSources = 6;  // x, x0, e, h, r, z, in the order of the table's columns

template <class X, int N>
static inline void sum(const X* c, const X* const* sources, int64_t count, X* __restrict out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    X v = N > 0 ? c[0] * sources[0][i] : X(0);
    for (int k = 1; k < N; ++k) v += c[k] * sources[k][i];
    out[i] = v;
  }
}

// out = sum of c_k source_k over those that are there and count.
template <class X>
static inline void combine(const X* c, const X* const* sources, int n, int64_t count, X* out) {
  X used[kSources];
  const X* there[kSources];
  int m = 0;
  for (int k = 0; k < n; ++k)
    if (sources[k] != nullptr && c[k] != 0) {
      used[m] = c[k];
      there[m++] = sources[k];
    }
  switch (m) {
    case 0: return sum<X, 0>(used, there, count, out);
    case 1: return sum<X, 1>(used, there, count, out);
    case 2: return sum<X, 2>(used, there, count, out);
    case 3: return sum<X, 3>(used, there, count, out);
    case 4: return sum<X, 4>(used, there, count, out);
    case 5: return sum<X, 5>(used, there, count, out);
    default: return sum<X, 6>(used, there, count, out);
  }
}

template <class X>
static inline X clipped(X v, X limit) {  // NaN stays NaN
  v = v < -limit ? -limit : v;
  return v > limit ? limit : v;
}

// x0 = clip(k_x x + k_e e).
template <class X>
static inline void predict(const SamplerStep& p, const Row<X>& r, int64_t sample, int64_t count,
                           const X* x, const X* e, X* __restrict x0) {
  const X k_x = r.c[kKx], k_e = r.c[kKe];
  if (p.dynamic) {
    const X s = static_cast<const X*>(p.statistics)[2 * sample + 1];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x0[i] = clipped(k_x * x[i] + k_e * e[i], s) / s;
    return;
  }
  const X clip = r.c[kClip];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x0[i] = clipped(k_x * x[i] + k_e * e[i], clip);
}

// z of the elements first .. first + count - 1 of a sample, `first` a multiple of 4.
template <class X>
static inline void noise(int64_t seed, int64_t step, int64_t first, int64_t count, X* z) {
  const int64_t blocks = (count + 3) / 4;
  for (int64_t i = 0; i < blocks; ++i)
    philox::normals(uint64_t(seed), uint64_t(step), uint64_t(first / 4 + i), z + 4 * i);
}

// The mask of the elements from `first` of a sample on: its own memory, or a copy where it repeats.
template <class X>
static inline const X* mask_of(const SamplerStep& p, int64_t sample, int64_t first, int64_t count,
                               X* room) {
  const X* mask = static_cast<const X*>(p.mask) + (p.mask_batch > 1 ? sample * p.mask_period : 0);
  int64_t at = first % p.mask_period;
  if (at + count <= p.mask_period) return mask + at;
  for (int64_t i = 0; i < count;) {
    const int64_t left = p.mask_period - at, some = left < count - i ? left : count - i;
    for (int64_t k = 0; k < some; ++k) room[i + k] = mask[at + k];
    i += some;
    at = 0;
  }
  return room;
}

// x' = mask x' + (1 - mask)(p_0 known + p_e z0), z0 in `z` unless p_e is 0.
template <class X>
static inline void mix_known(const SamplerStep& p, const Row<X>& r, int64_t sample, int64_t first,
                             int64_t count, X* z, X* room, X* __restrict x_next) {
  const X* mask = mask_of(p, sample, first, count, room);
  const X* known = static_cast<const X*>(p.known) + sample * p.inner + first;
  const X p_0 = r.c[kP0], p_e = r.c[kPe];
  if (p_e == 0) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      x_next[i] = mask[i] * x_next[i] + (1 - mask[i]) * (p_0 * known[i]);
    return;
  }
  noise(p.seeds[sample], philox::kStart, first, count, z);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    x_next[i] = mask[i] * x_next[i] + (1 - mask[i]) * (p_0 * known[i] + p_e * z[i]);
}

// Past the caches: what nobody reads before it has left them need not be read first either.
template <class M>
static inline void stream_all(M* to, const M* from, int64_t count) {
  int64_t i = 0;
  for (; i < count && reinterpret_cast<uintptr_t>(to + i) % kVectorBytes != 0; ++i) to[i] = from[i];
  constexpr int64_t kStep = kVectorBytes / sizeof(M);
  for (; i + kStep <= count; i += kStep) stream(to + i, from + i);
  for (; i < count; ++i) to[i] = from[i];
}

// Writes m v `copies` times, `apart` elements apart.
template <class X, class M>
static inline void write(X m, const X* v, int64_t count, bool streaming, M* to, int64_t copies = 1,
                         int64_t apart = 0) {
  if (copies == 0) return;
  alignas(64) M line[kChunk];
  M* __restrict first = streaming ? line : to;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(first + i, Acc<M>(m * v[i]));
  for (int64_t copy = streaming ? 0 : 1; copy < copies; ++copy) {
    if (streaming)
      stream_all(to + copy * apart, line, count);
    else
      memcpy(to + copy * apart, to, size_t(count) * sizeof(M));
  }
}

// The memory of x' itself where it has the type of the arithmetic.
template <class X>
static inline X* as_wide(X* x_next, X*) {
  return x_next;
}
template <class T, class X>
static inline X* as_wide(T*, X* room) {
  return room;
}

// Whether a sum has use for x0, the column after that of x.
template <class X>
static inline bool wants_x0(const SamplerStep& p, const Row<X>& r) {
  return r.c[kC0] != 0 || (p.histories > 0 && r.c[kG0] != 0) || (p.histories > 1 && r.c[kR0] != 0);
}

// Whether a row is guidance and a sum in float32 alone, which is what most steps are.
template <class X>
static inline bool is_common(const SamplerStep& p, const Row<X>& r) {
  return p.x_dtype == DType::kFloat32 && p.output_dtype == DType::kFloat32 &&
         p.input_dtype == DType::kFloat32 && p.n <= 2 && p.histories <= 1 && p.copies >= 1 &&
         p.rescale == nullptr && p.noise == nullptr && p.mask == nullptr &&
         (p.seeds == nullptr || r.c[kCn] == 0) && !wants_x0(p, r);
}

// Such a step in one loop, for the passes over a chunk would take as long as memory does.
// N: outputs; H: with a history; C: copies of the input, 2 for more.
template <int N, bool H, int C>
static inline void common_loop(const SamplerStep& p, const Row<float>& r, int64_t at,
                               int64_t count) {
  const int64_t all = p.batch * p.inner;
  const float* x = static_cast<const float*>(p.x) + at;
  const float* e_0 = static_cast<const float*>(p.outputs[0]) + at;
  const float* e_1 = N > 1 ? static_cast<const float*>(p.outputs[1]) + at : e_0;
  const float* h = H ? static_cast<const float*>(p.history) + at : x;
  float* __restrict x_next = static_cast<float*>(p.x_next) + at;
  float* __restrict h_next = H ? static_cast<float*>(p.history_next) + at : nullptr;
  float* __restrict input = static_cast<float*>(p.model_input) + at;
  float* __restrict again = C > 1 ? input + all : nullptr;
  const float w_0 = r.w[0], w_1 = N > 1 ? r.w[1] : 0, m = r.c[kM];
  const float c_x = r.c[kCx], c_e = r.c[kCe], c_h = r.c[kCh];
  const float g_x = r.c[kGx], g_e = r.c[kGe], g_h = r.c[kGh];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float e = w_0 * e_0[i];
    if (N > 1) e += w_1 * e_1[i];
    float v = c_x * x[i] + c_e * e;
    if (H) {
      v += c_h * h[i];
      h_next[i] = g_x * x[i] + g_e * e + g_h * h[i];
    }
    x_next[i] = v;
    input[i] = m * v;
    if (C > 1) again[i] = m * v;
  }
  for (int64_t copy = C > 1 ? 2 : 1; copy < p.copies; ++copy)
    memcpy(input + copy * all, input, size_t(count) * sizeof(float));
}

template <int N, bool H>
static inline void common_copies(const SamplerStep& p, const Row<float>& r, int64_t at,
                                 int64_t count) {
  if (p.copies == 1)
    common_loop<N, H, 1>(p, r, at, count);
  else
    common_loop<N, H, 2>(p, r, at, count);
}

static inline void common_step(const SamplerStep& p, const Row<float>& r, int64_t at,
                               int64_t count) {
  if (p.histories > 0)
    p.n > 1 ? common_copies<2, true>(p, r, at, count) : common_copies<1, true>(p, r, at, count);
  else
    p.n > 1 ? common_copies<2, false>(p, r, at, count) : common_copies<1, false>(p, r, at, count);
}

// float64 and sixteen bits have no such loop.
template <class X>
static inline void common_step(const SamplerStep&, const Row<X>&, int64_t, int64_t) {}

// T: the type of x and x'.
template <class T>
static inline void chunk(const SamplerStep& p, const Row<Acc<T>>& r, int64_t sample, int64_t first,
                         int64_t count, bool streaming) {
  using X = Acc<T>;
  alignas(64) X e[kChunk], x0[kChunk], z[kChunk], wide[kChunk], next[kChunk], room[kChunk];
  const int64_t at = sample * p.inner + first, all = p.batch * p.inner;
  if (is_common(p, r)) return common_step(p, r, at, count);
  const X* x = widened(static_cast<const T*>(p.x) + at, count, wide);
  guided(p, r.w, sample, at, count, p.rescale != nullptr, e);

  const X* sources[kSources] = {x, nullptr, e, nullptr, nullptr, nullptr};
  if (wants_x0(p, r)) {
    predict(p, r, sample, count, x, e, x0);
    sources[1] = x0;
  }
  for (int k = 0; k < p.histories; ++k)
    sources[3 + k] = static_cast<const X*>(p.history) + k * all + at;
  if (p.noise != nullptr) {
    sources[5] = static_cast<const X*>(p.noise) + at;
  } else if (p.seeds != nullptr && r.c[kCn] != 0) {
    noise(p.seeds[sample], *p.step, first, count, z);
    sources[5] = z;
  }

  // Where all of it does not fit into the caches it is put together here and written past them.
  T* x_next = static_cast<T*>(p.x_next) + at;
  X* result = streaming ? next : as_wide(x_next, next);
  combine(r.c + kCx, sources, 6, count, result);
  for (int k = 0; k < p.histories; ++k) {
    X* history_next = static_cast<X*>(p.history_next) + k * all + at;
    combine(r.c + (k == 0 ? kGx : kRx), sources, 5, count, streaming ? room : history_next);
    if (streaming) stream_all(history_next, room, count);
  }
  if (p.mask != nullptr) mix_known(p, r, sample, first, count, z, room, result);
  if (result == next) write<X, T>(1, result, count, streaming, x_next);
  FASTLORA_FLOAT_TYPES(p.input_dtype, M,
                       write<X, M>(r.c[kM], result, count, streaming,
                                   static_cast<M*>(p.model_input) + at, p.copies, all));
}

static inline int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

template <class T>
static void run(const SamplerStep& p) {
  using X = Acc<T>;
  const int64_t chunks = (p.inner + kChunk - 1) / kChunk;  // of one sample
  const int64_t total = p.batch * chunks;
  const int64_t element = int64_t(sizeof(T)) + p.histories * int64_t(sizeof(X)) +
                          p.copies * bytes_of(p.input_dtype);  // all that is written for one
  const bool streaming = p.batch * p.inner * element >= kStreamedBytes;
#pragma omp parallel if (p.batch * p.inner >= kElementsPerParallel)
  {
    Row<X> row;  // of the sample that this thread is in; of all where they share their weights
    int64_t row_sample = -1;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < total; ++task) {
      const int64_t sample = task / chunks, first = task % chunks * kChunk;
      const int64_t count = p.inner - first < kChunk ? p.inner - first : kChunk;
      if (row_sample < 0 || (p.weight_batch > 1 && sample != row_sample))
        row = row_of<X>(p, sample);
      row_sample = sample;
      chunk<T>(p, row, sample, first, count, streaming);
    }
    if (streaming) finish_streams();
  }
}

}  // namespace

void sampler_step_loop(const SamplerStep& p) { FASTLORA_FLOAT_TYPES(p.x_dtype, T, run<T>(p)); }

}  // namespace FASTLORA_ISA
}  // namespace fastlora
