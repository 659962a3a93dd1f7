// The low-rank linear layer row by row of W, as dot products: nothing is packed, every row of W, D
// and U is read where it lies, and h = (x Dᵀ) ∘ g joins the sums of x·Wᵀ as `rank` further inputs.
// For few tokens it takes as long as W takes to arrive; y is written once, whatever its dtype.
//
// A tile is kLanes sums (tokens x rows of W), each in a register of its own, whose elements are
// added up at the end: the same order for every shape of tile, so that a token gets the same bits
// whatever is beside it.
#include "../lora_linear.h"

#include <cstdlib>

#include "rank_update.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

constexpr int64_t kBlockBytes = 1 << 19;  // of x: part of the second-level cache
constexpr int64_t kMostTokens = 192;      // of a block
// Inputs at a time of four rows of W that the first-level cache holds; more than kUncut are cut,
// into pieces that fill half of its ways evenly also where rows are whole pages apart.
constexpr int64_t kUncut = 1280, kInputs = 1024;
constexpr int64_t kOuts = 32;             // rows of W of a task, at least
constexpr int64_t kThreadWork = 1 << 17;  // multiplications that are worth waking a thread
constexpr int64_t kStackBytes = 1 << 14;  // of scratch memory; more is allocated

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// --- vectors of float from any element type ------------------------------------------------------

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));

static inline Words load_words(const void* from) {
  Shorts s;
  std::memcpy(&s, from, sizeof s);
  return __builtin_convertvector(s, Words);
}

static inline Vector<float> load_wide(const float* from) { return load_vector(from); }
static inline Vector<double> load_wide(const double* from) { return load_vector(from); }
static inline Vector<float> load_wide(const BFloat16* from) {
  return (Vector<float>)(load_words(from) << 16);
}
static inline Vector<float> load_wide(const Half* from) {
#if defined(__AVX512F__)
  __m256i h;
  std::memcpy(&h, from, sizeof h);
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, h);  // (GCC 12 warns of the other one)
#else
  const Words h = load_words(from);  // as load(const Half*) does
  const Vector<float> magnitude = (Vector<float>)((h & 0x7fffu) << 13) * as_float(0x77800000u);
  const Words special = (Words)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (Vector<float>)((Words)magnitude | special | ((h & 0x8000u) << 16));
#endif
}

// The first `count` (fewer than a register's) elements, then zeros.
template <class A, class T>
static inline Vector<A> load_first(const T* from, int64_t count) {
  A line[kLanes<A>] = {};
  for (int64_t j = 0; j < count; ++j) line[j] = A(load(from + j));
  return load_vector(line);
}
#if defined(__AVX512F__)
template <>
inline Vector<float> load_first<float>(const float* from, int64_t count) {
  return (Vector<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
}
#endif

// --- sums ----------------------------------------------------------------------------------------

// Element i of the result is element index[i] of a and b, one after the other.
template <class V, class Index>
static inline V shuffled(V a, V b, Index index) {
#ifdef __clang__
  constexpr int n = sizeof(V) / sizeof a[0];
  V result;
  for (int i = 0; i < n; ++i) result[i] = index[i] < n ? a[index[i]] : b[index[i] - n];
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Neighbours of a, then of b, added. (The sums must not depend on how the compiler sees one tile:
// hence whole registers.)
static inline Vector<float> add_neighbours(Vector<float> a, Vector<float> b) {
  typedef int32_t Index __attribute__((vector_size(kVectorBytes)));
#if defined(__AVX512F__)
  constexpr Index even{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#elif defined(__AVX__)
  constexpr Index even{0, 2, 4, 6, 8, 10, 12, 14};
#else
  constexpr Index even{0, 2, 4, 6};
#endif
  return shuffled(a, b, even) + shuffled(a, b, even + 1);
}
static inline Vector<double> add_neighbours(Vector<double> a, Vector<double> b) {
  typedef int64_t Index __attribute__((vector_size(kVectorBytes)));
#if defined(__AVX512F__)
  constexpr Index even{0, 2, 4, 6, 8, 10, 12, 14};
#elif defined(__AVX__)
  constexpr Index even{0, 2, 4, 6};
#else
  constexpr Index even{0, 2};
#endif
  return shuffled(a, b, even) + shuffled(a, b, even + 1);
}

// Element i of the result is the sum of sum[i]'s elements.
template <class A>
static inline __attribute__((always_inline)) Vector<A> totals(Vector<A> (&sum)[kLanes<A>]) {
#pragma GCC unroll 4
  for (int n = kLanes<A> / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) sum[i] = add_neighbours(sum[2 * i], sum[2 * i + 1]);
  return sum[0];
}

template <class T>
struct Rows {
  const T* data;
  int64_t stride;  // between rows; elements of a row are neighbours
};

// sum[m][n] += x[m] · w[n] over `count` inputs, x being zero up to whole vectors.
template <class A, int M, class T>
static inline __attribute__((always_inline)) void dots(const Rows<A>& x, const T* const* w,
                                                       int64_t count, Vector<A> (&sum)[kLanes<A>]) {
  constexpr int N = kLanes<A> / M;
  const int64_t whole = count / kLanes<A> * kLanes<A>;
  for (int64_t k = 0; k < whole; k += kLanes<A>) {
    Vector<A> row[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) row[m] = load_vector(x.data + m * x.stride + k);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const Vector<A> v = load_wide(w[n] + k);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sum[m * N + n] += row[m] * v;
    }
  }
  if (whole == count) return;
  // First all of them, then the arithmetic without a branch between multiplication and addition:
  // with one the compiler would not fuse them, and the last inputs would round otherwise.
  Vector<A> last[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) last[n] = load_first<A>(w[n] + whole, count - whole);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const Vector<A> row = load_vector(x.data + m * x.stride + whole);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[m * N + n] += row * last[n];
  }
}

// One product y = m ∘ (x Wᵀ + h Uᵀ) + b; W's elements are T, U's are F, y's are Y.
template <class A, class T, class F, class Y>
struct Product {
  Rows<A> x;
  Rows<T> w;
  Rows<A> h;
  Rows<F> u;
  Y* y;
  int64_t y_stride;
  const Y *bias, *row_scale;
  int64_t in, rank;
  Vector<A>* partial;  // the sums of all tiles of a block, where inputs are cut
};

// What is done to the sums of a tile, in their order; the same for all tokens.
template <class A>
struct Finish {
  Vector<A> scale, bias;
};

// The values of the rows that a tile has, for each of its M tokens.
template <int M, class A, class Y>
static inline Vector<A> for_tokens(const Y* values, int64_t valid, A otherwise) {
  constexpr int N = kLanes<A> / M;
  if (values == nullptr) return Vector<A>{} + otherwise;
  A line[M][N];
  for (int i = 0; i < N; ++i) line[0][i] = A(load(values + (i < valid ? i : valid - 1)));
  if constexpr (M > 1)
    for (int m = 1; m < M; ++m) std::memcpy(line[m], line[0], sizeof line[0]);
  return load_vector(line[0]);
}

// Some of the inputs, and where the sums over those before them are. kCut: not all of them at once.
template <class A, bool kCut>
struct Inputs {
  int64_t first, count;
  bool last;
  Vector<A>* partial;  // of the next tile
};

// M tokens from `token` on, the kLanes / M rows of W from `n` on, `valid` of which exist.
template <int M, bool kCut, class A, class T, class F, class Y>
static inline void tile(const Product<A, T, F, Y>& p, const Finish<A>& finish,
                        Inputs<A, kCut>& inputs, int64_t token, int64_t n, int64_t valid) {
  constexpr int N = kLanes<A> / M;
  const T* w[N];
  const F* u[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    const int64_t row = n + (i < valid ? i : valid - 1);  // the last again: nobody looks at it
    w[i] = p.w.data + row * p.w.stride + (kCut ? inputs.first : 0);
    u[i] = p.u.data + row * p.u.stride;
  }
  Vector<A> sum[kLanes<A>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<A>; ++i) sum[i] = Vector<A>{};
  const A* x = p.x.data + token * p.x.stride + (kCut ? inputs.first : 0);
  dots<A, M>({x, p.x.stride}, w, kCut ? inputs.count : p.in, sum);
  if ((!kCut || inputs.last) && p.rank > 0)
    dots<A, M>({p.h.data + token * p.h.stride, p.h.stride}, u, p.rank, sum);
  Vector<A> total = totals<A>(sum);
  if constexpr (kCut) {
    if (inputs.first > 0) total += *inputs.partial;
    *inputs.partial++ = total;
    if (!inputs.last) return;
  }
  A line[kLanes<A>];
  store_vector(line, total * finish.scale + finish.bias);
  Y* y = p.y + token * p.y_stride + n;
  if (sizeof(Y) == sizeof(A) && valid >= N) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) std::memcpy(y + m * p.y_stride, line + m * N, N * sizeof(A));
    return;
  }
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < (valid < N ? valid : N); ++i)
      store(y + m * p.y_stride + i, line[m * N + i]);
}

// M tokens at a time of first..end-1, and `rows` rows of W from `n` on.
template <int M, bool kCut, class A, class T, class F, class Y>
static void tiles_of(const Product<A, T, F, Y>& p, Inputs<A, kCut>& inputs, int64_t first,
                     int64_t end, int64_t n, int64_t rows) {
  constexpr int N = kLanes<A> / M;
  for (int64_t part = 0; part < rows; part += N) {  // stays in the first-level cache
    const Y* scale = p.row_scale == nullptr ? nullptr : p.row_scale + n + part;
    const Y* bias = p.bias == nullptr ? nullptr : p.bias + n + part;
    const Finish<A> finish{for_tokens<M>(scale, rows - part, A(1)),
                           for_tokens<M>(bias, rows - part, A(0))};
    for (int64_t token = first; token < end; token += M)
      tile<M>(p, finish, inputs, token, n + part, rows - part);
  }
}

// The tokens first..end-1, the rows of W from..to-1, some of the inputs.
template <bool kCut, class A, class T, class F, class Y>
static void block_of(const Product<A, T, F, Y>& p, Inputs<A, kCut> inputs, int64_t first,
                     int64_t end, int64_t from, int64_t to) {
  constexpr int most = kLanes<A> >= 16 ? 4 : 2;  // tokens of a tile
  const int64_t whole = end - (end - first) % most, pairs = end - (end - first) % 2;
  for (int64_t n = from; n < to; n += kLanes<A>) {
    const int64_t rows = to - n < kLanes<A> ? to - n : kLanes<A>;
    tiles_of<most>(p, inputs, first, whole, n, rows);
    if constexpr (most > 2) tiles_of<2>(p, inputs, whole, pairs, n, rows);
    tiles_of<1>(p, inputs, pairs, end, n, rows);
  }
}

template <class A, class T, class F, class Y>
static void block(const Product<A, T, F, Y>& p, int64_t first, int64_t end, int64_t from,
                  int64_t to) {
  if (p.partial == nullptr)
    return block_of(p, Inputs<A, false>{0, p.in, true, nullptr}, first, end, from, to);
  for (int64_t k = 0; k < p.in; k += kInputs) {
    const int64_t count = least(p.in - k, kInputs);
    block_of(p, Inputs<A, true>{k, count, k + count == p.in, p.partial}, first, end, from, to);
  }
}

// --- the layer -----------------------------------------------------------------------------------

template <class T>
struct Layer {
  using A = Acc<T>;
  const LoraLinear& p;
  Rows<A> x;  // p.x, or a copy of it: rows are zero up to whole vectors
  A* h;
  int64_t h_stride;
  bool copied;
  Vector<A>* partial;  // of all threads
  int64_t per_thread;

  Vector<A>* mine() const {
#ifdef _OPENMP
    return partial == nullptr ? nullptr : partial + omp_get_thread_num() * per_thread;
#else
    return partial;
#endif
  }

  void copy(int64_t first, int64_t end) const {
    const int64_t row_stride = p.x.strides[0], column_stride = p.x.strides[1];
    for (int64_t token = first; token < end; ++token) {
      const T* from = p.x.ptr<const T>() + token * row_stride;
      A* to = const_cast<A*>(x.data) + token * x.stride;
      if (column_stride == 1) {
#pragma omp simd
        for (int64_t k = 0; k < p.in; ++k) to[k] = A(load(from + k));
      } else {
        for (int64_t k = 0; k < p.in; ++k) to[k] = A(load(from + k * column_stride));
      }
      for (int64_t k = p.in; k < x.stride; ++k) to[k] = 0;
    }
  }

  template <class D>
  void down_of(int64_t first, int64_t end, int64_t from, int64_t to) const {
    const Rows<D> d{p.down.ptr<const D>(), p.down.strides[0]};
    const Product<A, D, D, A> product{
        x, d, {}, d, h, h_stride, nullptr, nullptr, p.in, 0, mine(),
    };
    block(product, first, end, from, to);
  }

  // h = (x Dᵀ) ∘ g; columns from..to-1, and the zeros beyond the rank with the last of them.
  void activation(int64_t first, int64_t end, int64_t from, int64_t to) const {
    if (p.down.dtype == p.y.dtype)
      down_of<T>(first, end, from, to);
    else
      down_of<A>(first, end, from, to);
    const bool rows = p.gate.ndim == 2;
    const int64_t stride = p.gate.strides[rows ? 1 : 0];
    for (int64_t token = first; token < end; ++token) {
      const A* g =
          p.gate.ptr<const A>() + (rows ? token / p.tokens_per_row * p.gate.strides[0] : 0);
      A* row = h + token * h_stride;
      for (int64_t r = from; r < to; ++r) row[r] *= g[r * stride];
      for (int64_t r = p.rank; to == p.rank && r < h_stride; ++r) row[r] = 0;
    }
  }

  template <class F>
  void output_of(int64_t first, int64_t end, int64_t from, int64_t to) const {
    const Product<A, T, F, T> product{
        x,
        {p.weight.ptr<const T>(), p.weight.strides[0]},
        {h, h_stride},
        {p.up.ptr<const F>(), p.up.strides[0]},
        p.y.ptr<T>(),
        p.y.strides[0],
        p.bias.ptr<const T>(),
        p.row_scale.ptr<const T>(),
        p.in,
        p.rank,
        mine(),
    };
    block(product, first, end, from, to);
  }

  void output(int64_t first, int64_t end, int64_t from, int64_t to) const {
    if (p.up.dtype == p.y.dtype)
      output_of<T>(first, end, from, to);
    else
      output_of<A>(first, end, from, to);
  }

  void all(int64_t first, int64_t end) const {
    if (copied) copy(first, end);
    activation(first, end, 0, p.rank);
    output(first, end, 0, p.out);
  }
};

template <class T>
bool run(const LoraLinear& p) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>;
  int64_t most = 1;
#ifdef _OPENMP
  const int64_t work = p.tokens * (p.in * p.out + p.rank * (p.in + p.out));
  most = least(omp_get_max_threads(), 1 + work / kThreadWork);
#endif
  // Rows that are whole pages apart would share few sets of the cache among them and with W's.
  const bool crowded = p.tokens > 4 && p.x.strides[0] * sizeof(A) % 4096 == 0;
  const bool copied = sizeof(T) != sizeof(A) || p.in % lanes != 0 || p.x.strides[1] != 1 || crowded;
  const int64_t x_stride = copied ? odd_pitch<A>(p.in) : p.x.strides[0];
  const int64_t h_stride = round_up(p.rank, lanes);
  const int64_t x_size = copied ? p.tokens * x_stride : 0;

  const int64_t row = (least(p.in, kUncut) + 1) * sizeof(A);
  const int64_t limit = least(kBlockBytes / row / 4 * 4, kMostTokens);
  const int64_t even = (p.tokens + limit - 1) / limit;  // blocks, all of about the same size
  const int64_t tokens = round_up((p.tokens + even - 1) / even, 4);
  const int64_t blocks = (p.tokens + tokens - 1) / tokens;

  // No more tiles than tokens for every register of outputs.
  const int64_t widest = p.out > p.rank ? p.out : p.rank;
  const int64_t per_thread = p.in > kUncut ? tokens * ((widest + lanes - 1) / lanes) : 0;
  const int64_t size =
      (x_size + p.tokens * h_stride) * sizeof(A) + most * per_thread * kVectorBytes;
  alignas(kLine) char small[kStackBytes];
  char* memory = size <= kStackBytes ? small : static_cast<char*>(std::malloc(size + kLine));
  if (memory == nullptr) return false;
  char* aligned = small;
  if (memory != small) aligned = memory + kLine - reinterpret_cast<uintptr_t>(memory) % kLine;
  auto* partial = reinterpret_cast<Vector<A>*>(aligned);
  A* own_h = reinterpret_cast<A*>(partial + most * per_thread);
  A* own_x = own_h + p.tokens * h_stride;
  const Layer<T> layer{p,         {copied ? own_x : p.x.ptr<const A>(), x_stride},
                       own_h,     h_stride,
                       copied,    per_thread > 0 ? partial : nullptr,
                       per_thread};
  if (most == 1) {
    for (int64_t b = 0; b < blocks; ++b) layer.all(b * tokens, least((b + 1) * tokens, p.tokens));
  } else if (blocks >= 8 * most) {  // enough for all threads: each keeps its x in its cache
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(most))
    for (int64_t b = 0; b < blocks; ++b) layer.all(b * tokens, least((b + 1) * tokens, p.tokens));
  } else {
    // Threads share the tokens and divide the rows of W, of which each reads its part once.
    int64_t outs = round_up((p.out + most - 1) / most, lanes);
    if (blocks > 1) outs = least(outs, round_up(outs / 4, kOuts));
    const int64_t parts = (p.out + outs - 1) / outs;
    const int64_t ranks = (p.rank + lanes - 1) / lanes;
#pragma omp parallel num_threads(int(least(most, blocks * parts)))
    {
      if (layer.copied) {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < p.tokens; ++token) layer.copy(token, token + 1);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < blocks * ranks; ++i) {
        const int64_t first = i / ranks * tokens, from = i % ranks * lanes;
        layer.activation(first, least(first + tokens, p.tokens), from, least(from + lanes, p.rank));
      }
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < blocks * parts; ++i) {
        const int64_t first = i % blocks * tokens, from = i / blocks * outs;
        layer.output(first, least(first + tokens, p.tokens), from, least(from + outs, p.out));
      }
    }
  }
  if (memory != small) std::free(memory);
  return true;
}

}  // namespace

void lora_linear_loop(const LoraLinear& p, bool& out_of_memory) {
  FASTLORA_FLOAT_TYPES(p.y.dtype, T, out_of_memory = !run<T>(p));
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
