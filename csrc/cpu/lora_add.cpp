// y += ((x Dᵀ) ∘ g) Uᵀ in one pass over x and y. A task takes kTokens tokens: their rank-r
// activation stays in its thread's scratch memory, gated, in the order in which the tiles of y read
// it. D and U are packed once, for all tasks.
#include <cstdlib>

#include "../lora_linear.h"
#include "rank_update.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

constexpr int64_t kTokens = 48;
static_assert(kTokens % kRows == 0, "a task consists of whole tiles");
// Inputs that are converted to float at a time, and that are summed before they join the sum of
// all: one after the other, thousands would round away more than a library's product does.
constexpr int64_t kChunk = 128;
constexpr int64_t kStripBytes = 1 << 18;  // of packed U: part of the second-level cache
constexpr int64_t kBlock = 64;            // columns that are transposed at a time

template <class A>
struct Workspace {
  A* down;     // [in][ranks], Dᵀ with zeros beyond the rank
  A* up;       // [rank][pitch], Uᵀ with zeros beyond the outputs
  A* threads;  // each: h [kRows][ranks], factors [kTokens / kRows][rank][kRows], x [kRows][kChunk]
  int64_t ranks;  // the rank in whole registers
  int64_t pitch;
  int64_t per_thread;
};

template <class A>
Workspace<A> workspace(const LoraLinear& p) {
  Workspace<A> s{};
  s.ranks = round_up(p.rank, kLanes<A>);
  s.pitch = odd_pitch<A>(round_up(p.out, kColumns<A>));
  s.per_thread = round_up(kRows * s.ranks + kTokens * p.rank + kRows * kChunk, kLine);
  return s;
}

// to[j][i] = from[i, j] for the columns first..end-1 of a matrix of `rows` rows.
template <class A, class S>
void transpose(const TensorView& t, int64_t rows, int64_t first, int64_t end, A* to,
               int64_t pitch) {
  for (int64_t i = 0; i < rows; ++i) {
    const S* from = t.ptr<const S>() + i * t.strides[0];
    for (int64_t j = first; j < end; ++j) to[j * pitch + i] = A(load(from + j * t.strides[1]));
  }
}

template <class A, class T>
void transpose_any(const TensorView& t, DType dtype, int64_t rows, int64_t first, int64_t end,
                   A* to, int64_t pitch) {
  if (t.dtype == dtype)
    transpose<A, T>(t, rows, first, end, to, pitch);
  else
    transpose<A, A>(t, rows, first, end, to, pitch);
}

// h += x · Dᵀ for kRows tokens, kCount inputs and V registers of the rank.
template <class A, int V>
static inline void down_tile(const A* x, int64_t x_stride, int64_t count, const A* down,
                             int64_t ranks, A* h) {
  Vector<A> sum[kRows][V];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[m][v] = Vector<A>{};
  for (int64_t k = 0; k < count; ++k, down += ranks) {
    Vector<A> d[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) d[v] = load_vector(down + v * kLanes<A>);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[m][v] += x[m * x_stride + k] * d[v];
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      A* to = h + m * ranks + v * kLanes<A>;
      store_vector(to, load_vector(to) + sum[m][v]);
    }
}

template <class A>
void down_rows(const A* x, int64_t x_stride, int64_t count, const A* down, int64_t ranks, A* h) {
  int64_t r = 0;
  for (; ranks - r >= 2 * kLanes<A>; r += 2 * kLanes<A>)
    down_tile<A, 2>(x, x_stride, count, down + r, ranks, h + r);
  if (r < ranks) down_tile<A, 1>(x, x_stride, count, down + r, ranks, h + r);
}

// h = x Dᵀ for `rows` (at most kRows) tokens from `token` on.
template <class T>
void activation(const LoraLinear& p, const Workspace<Acc<T>>& s, int64_t token, int64_t rows,
                Acc<T>* h, Acc<T>* chunk) {
  using A = Acc<T>;
  const int64_t row_stride = p.x.strides[0], column_stride = p.x.strides[1];
  const T* x = p.x.ptr<const T>() + token * row_stride;
  std::memset(h, 0, kRows * s.ranks * sizeof(A));
  if constexpr (sizeof(T) == sizeof(A)) {
    if (rows == kRows && column_stride == 1) {
      for (int64_t k = 0; k < p.in; k += kChunk) {
        const int64_t count = p.in - k < kChunk ? p.in - k : kChunk;
        down_rows<A>(x + k, row_stride, count, s.down + k * s.ranks, s.ranks, h);
      }
      return;
    }
  }
  for (int64_t k = 0; k < p.in; k += kChunk) {
    const int64_t count = p.in - k < kChunk ? p.in - k : kChunk;
    for (int64_t m = 0; m < kRows; ++m) {
      A* to = chunk + m * kChunk;
      const T* from = x + m * row_stride + k * column_stride;
      if (m >= rows) {
        std::memset(to, 0, count * sizeof(A));
      } else if (column_stride == 1) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) to[j] = A(load(from + j));
      } else {
        for (int64_t j = 0; j < count; ++j) to[j] = A(load(from + j * column_stride));
      }
    }
    down_rows<A>(chunk, kChunk, count, s.down + k * s.ranks, s.ranks, h);
  }
}

template <class T>
void tokens_of(const LoraLinear& p, const Workspace<Acc<T>>& s, int64_t first, int64_t end,
               Acc<T>* mine) {
  using A = Acc<T>;
  A *h = mine, *factors = mine + kRows * s.ranks, *chunk = factors + kTokens * p.rank;
  const bool gate_rows = p.gate.ndim == 2;
  const int64_t gate_stride = p.gate.strides[gate_rows ? 1 : 0];
  for (int64_t token = first; token < end; token += kRows) {
    const int64_t rows = end - token < kRows ? end - token : kRows;
    if (p.down.defined) activation<T>(p, s, token, rows, h, chunk);
    A* f = factors + (token - first) * p.rank;
    for (int64_t m = 0; m < kRows; ++m) {
      if (m >= rows) {
        for (int64_t r = 0; r < p.rank; ++r) f[r * kRows + m] = 0;
        continue;
      }
      const A* gate = p.gate.ptr<const A>();
      if (gate_rows) gate += (token + m) / p.tokens_per_row * p.gate.strides[0];
      const T* x = p.x.ptr<const T>() + (token + m) * p.x.strides[0];
      for (int64_t r = 0; r < p.rank; ++r)
        f[r * kRows + m] = gate[r * gate_stride] *
                           (p.down.defined ? h[m * s.ranks + r] : load(x + r * p.x.strides[1]));
    }
  }
  const int64_t fitting = kStripBytes / int64_t(p.rank * sizeof(A)) / kColumns<A> * kColumns<A>;
  const int64_t strip = fitting < kColumns<A> ? kColumns<A> : fitting;
  for (int64_t column = 0; column < p.out; column += strip) {
    const int64_t columns = p.out - column < strip ? p.out - column : strip;
    for (int64_t token = first; token < end; token += kRows) {
      T* y = p.y.ptr<T>() + token * p.y.strides[0] + column * p.y.strides[1];
      tiles<T>({factors + (token - first) * p.rank, s.up + column, s.pitch, int32_t(p.rank)},
               {y, p.y.strides[0], p.y.strides[1]}, {y, p.y.strides[0], p.y.strides[1]},
               end - token < kRows ? end - token : kRows, columns, false);
    }
  }
}

template <class T>
bool run(const LoraLinear& p) {
  using A = Acc<T>;
  Workspace<A> s = workspace<A>(p);
  const int64_t tasks = (p.tokens + kTokens - 1) / kTokens;
#ifdef _OPENMP
  const int64_t most = omp_get_max_threads();
#else
  const int64_t most = 1;
#endif
  const int threads = int(tasks < most ? tasks : most);
  const int64_t down = p.down.defined ? round_up(p.in * s.ranks, kLine) : 0;
  const int64_t up = round_up(p.rank * s.pitch, kLine);
  char* memory =
      static_cast<char*>(std::malloc((down + up + threads * s.per_thread) * sizeof(A) + kLine));
  if (memory == nullptr) return false;
  s.down = reinterpret_cast<A*>(memory + kLine - reinterpret_cast<uintptr_t>(memory) % kLine);
  s.up = s.down + down;
  s.threads = s.up + up;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#ifdef _OPENMP
    A* mine = s.threads + omp_get_thread_num() * s.per_thread;
#else
    A* mine = s.threads;
#endif
    if (p.down.defined) {
#pragma omp for schedule(static) nowait
      for (int64_t k = 0; k < p.in; k += kBlock) {
        const int64_t end = p.in - k < kBlock ? p.in : k + kBlock;
        if (s.ranks > p.rank) std::memset(s.down + k * s.ranks, 0, (end - k) * s.ranks * sizeof(A));
        transpose_any<A, T>(p.down, p.y.dtype, p.rank, k, end, s.down, s.ranks);
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < s.pitch; n += kBlock) {
      // U's rows are the packed matrix' columns: a block of them at a time
      const int64_t end = s.pitch - n < kBlock ? s.pitch : n + kBlock;
      const int64_t valid = p.out < end ? p.out : end;
      for (int64_t r = 0; r < p.rank; ++r) {
        A* to = s.up + r * s.pitch;
        const int64_t row = p.up.strides[0], at = r * p.up.strides[1];
        if (p.up.dtype == p.y.dtype)
          for (int64_t j = n; j < valid; ++j) to[j] = A(load(p.up.ptr<const T>() + j * row + at));
        else
          for (int64_t j = n; j < valid; ++j) to[j] = p.up.ptr<const A>()[j * row + at];
        for (int64_t j = n < p.out ? valid : n; j < end; ++j) to[j] = 0;
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t first = task * kTokens;
      tokens_of<T>(p, s, first, p.tokens - first < kTokens ? p.tokens : first + kTokens, mine);
    }
  }
  std::free(memory);
  return true;
}

template <class A, class T>
static inline A dot(const A* a, const T* b, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * A(load(b + i));
  return sum;
}

// For shapes so small that packing would cost more than the arithmetic: contiguous matrices of one
// dtype.
template <class T>
void run_tiny(const LoraLinear& p) {
  using A = Acc<T>;
  const T *x = p.x.ptr<const T>(), *down = p.down.ptr<const T>(), *up = p.up.ptr<const T>();
  const A* gate = p.gate.ptr<const A>();
  T* y = p.y.ptr<T>();
  A row[4096];  // this token's x, widened once
  A h[1024];    // this token's gated rank-r activation
  for (int64_t token = 0; token < p.tokens; ++token) {
    const A* g = gate + (p.gate.ndim == 2 ? token / p.tokens_per_row * p.rank : 0);
    for (int64_t k = 0; k < p.in; ++k) row[k] = A(load(x + token * p.in + k));
    for (int64_t r = 0; r < p.rank; ++r)
      h[r] = g[r] * (p.down.defined ? dot(row, down + r * p.in, p.in) : row[r]);
    for (int64_t n = 0; n < p.out; ++n) {
      T* to = y + token * p.out + n;
      store(to, A(load(to)) + dot(h, up + n * p.rank, p.rank));
    }
  }
}

}  // namespace

void lora_add_tiny_loop(const LoraLinear& p) { FASTLORA_FLOAT_TYPES(p.y.dtype, T, run_tiny<T>(p)); }

void lora_add_loop(const LoraLinear& p, bool& out_of_memory) {
  FASTLORA_FLOAT_TYPES(p.y.dtype, T, out_of_memory = !run<T>(p));
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
