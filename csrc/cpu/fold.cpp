// W' = W + U diag(g) D in one pass over W: tiles of kRows x kColumns whose low-rank part is summed
// in registers and added to W once. The operands are packed in the order in which the tiles read
// them.
#include "../fold.h"

#include <cstdlib>

#include "rank_update.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

static_assert(kFoldRows % kRows == 0, "a task consists of whole tiles");

constexpr int64_t kStripBytes = 1 << 18;  // of packed D: part of the second-level cache
constexpr int64_t kSerialWork = 1 << 16;  // elements of W that are not worth a second thread
// One task's packed operands, inside one thread's scratch memory.
template <class A>
struct Packed {
  int32_t* active;  // [rank], the components whose gate is not zero
  A* factors;       // [kFoldRows / kRows][active][kRows], U diag(g)
  A* strip;         // [active][pitch], a strip of D with zeros beyond its columns
  int64_t columns;  // of a strip, whole tiles
  int64_t pitch;    // an odd number of cache lines: rows spread over the sets of the caches
  int32_t count;    // of active components
};

template <class A>
static inline int64_t strip_columns(const FoldLayer& p) {
  const int64_t fitting = kStripBytes / int64_t(p.rank * sizeof(A)) / kColumns<A> * kColumns<A>;
  const int64_t all = round_up(p.in, kColumns<A>);
  return fitting < kColumns<A> ? kColumns<A> : fitting < all ? fitting : all;
}

template <class A>
static inline int64_t scratch_bytes(const FoldLayer& p) {
  if (p.rank == 0) return 0;
  return round_up(p.rank * sizeof(int32_t), kLine) +
         round_up(p.rank * kFoldRows * sizeof(A), kLine) +
         p.rank * odd_pitch<A>(strip_columns<A>(p)) * sizeof(A);
}

template <class A>
static inline Packed<A> packed(const FoldLayer& p, char* scratch) {
  Packed<A> s;
  s.active = reinterpret_cast<int32_t*>(scratch);
  scratch += round_up(p.rank * sizeof(int32_t), kLine);
  s.factors = reinterpret_cast<A*>(scratch);
  s.strip = reinterpret_cast<A*>(scratch + round_up(p.rank * kFoldRows * sizeof(A), kLine));
  s.count = 0;
  const A* gate = static_cast<const A*>(p.gate);
  for (int32_t k = 0; k < p.rank; ++k)
    if (gate[k * p.gate_stride] != 0) s.active[s.count++] = k;
  if (s.count == 0) return s;
  s.columns = strip_columns<A>(p);
  s.pitch = odd_pitch<A>(s.columns);
  return s;
}

template <class A, class S>
void pack_factors(const FoldLayer& p, const Packed<A>& s, int64_t first_row, int64_t rows) {
  const S* up = static_cast<const S*>(p.up) + first_row * p.up_stride[0];
  const A* gate = static_cast<const A*>(p.gate);
  for (int64_t group = 0; group * kRows < rows; ++group)
    for (int64_t m = 0; m < kRows; ++m) {
      const int64_t row = group * kRows + m;
      A* to = s.factors + group * kRows * s.count + m;
      if (row >= rows) {
        for (int32_t k = 0; k < s.count; ++k) to[k * kRows] = 0;
        continue;
      }
      for (int32_t k = 0; k < s.count; ++k) {
        const int64_t r = s.active[k];
        to[k * kRows] =
            gate[r * p.gate_stride] * A(load(up + row * p.up_stride[0] + r * p.up_stride[1]));
      }
    }
}

template <class A, class S>
void pack_strip(const FoldLayer& p, const Packed<A>& s, int64_t first, int64_t columns) {
  const int64_t stride = p.down_stride[1], end = round_up(columns, kColumns<A>);
  for (int32_t k = 0; k < s.count; ++k) {
    const S* from = static_cast<const S*>(p.down) + s.active[k] * p.down_stride[0] + first * stride;
    A* to = s.strip + k * s.pitch;
    if (stride == 1) {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) to[j] = A(load(from + j));
    } else {
      for (int64_t j = 0; j < columns; ++j) to[j] = A(load(from + j * stride));
    }
    for (int64_t j = columns; j < end; ++j) to[j] = 0;
  }
}

// No component is active: the same bits.
template <class T>
void copy_rows(const FoldLayer& p, int64_t first, int64_t end) {
  if (p.weight == p.result) return;
  for (int64_t row = first; row < end; ++row) {
    const T* w = static_cast<const T*>(p.weight) + row * p.weight_stride[0];
    T* out = static_cast<T*>(p.result) + row * p.result_stride[0];
    if (p.weight_stride[1] == 1 && p.result_stride[1] == 1)
      std::memcpy(out, w, p.in * sizeof(T));
    else
      for (int64_t j = 0; j < p.in; ++j) out[j * p.result_stride[1]] = w[j * p.weight_stride[1]];
  }
}

template <class T>
void rows_of(const FoldLayer& p, int64_t first, int64_t end, bool streaming, char* scratch) {
  using A = Acc<T>;
  const Packed<A> s = packed<A>(p, scratch);
  if (s.count == 0) return copy_rows<T>(p, first, end);
  if (p.up_dtype == p.dtype)
    pack_factors<A, T>(p, s, first, end - first);
  else
    pack_factors<A, A>(p, s, first, end - first);
  for (int64_t column = 0; column < p.in; column += s.columns) {
    const int64_t columns = p.in - column < s.columns ? p.in - column : s.columns;
    if (p.down_dtype == p.dtype)
      pack_strip<A, T>(p, s, column, columns);
    else
      pack_strip<A, A>(p, s, column, columns);
    const T* w = static_cast<const T*>(p.weight) + column * p.weight_stride[1];
    T* out = static_cast<T*>(p.result) + column * p.result_stride[1];
    for (int64_t row = first; row < end; row += kRows)
      tiles<T>({s.factors + (row - first) * s.count, s.strip, s.pitch, s.count},
               {w + row * p.weight_stride[0], p.weight_stride[0], p.weight_stride[1]},
               {out + row * p.result_stride[0], p.result_stride[0], p.result_stride[1]},
               end - row < kRows ? end - row : kRows, columns, streaming);
  }
}

}  // namespace

void fold_loop(FoldTasks& p) {
  int64_t bytes = 0, work = 0;  // scratch of one thread; elements of W
  for (int64_t i = 0; i < p.count; ++i) {
    int64_t needed = 0;
    FASTLORA_FLOAT_TYPES(p.layers[i].dtype, T, needed = scratch_bytes<Acc<T>>(p.layers[i]));
    if (needed > bytes) bytes = needed;
    work += int64_t(p.layers[i].out) * p.layers[i].in;
  }
  bytes = round_up(bytes, kLine) + kLine;
  const bool parallel = work >= kSerialWork;
#ifdef _OPENMP
  const int threads = parallel ? omp_get_max_threads() : 1;
#else
  const int threads = 1;
#endif
  char* scratch = static_cast<char*>(std::malloc(threads * bytes));
  p.out_of_memory = scratch == nullptr;
  if (p.out_of_memory) return;
  const int64_t total = p.first_task[p.count];
#pragma omp parallel num_threads(threads) if (parallel)
  {
#ifdef _OPENMP
    char* mine = scratch + omp_get_thread_num() * bytes;
#else
    char* mine = scratch;
#endif
    mine += kLine - reinterpret_cast<uintptr_t>(mine) % kLine;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < total; ++task) {
      int64_t i = 0, end = p.count;  // the layer: first_task[i] <= task < first_task[i + 1]
      while (end - i > 1) {
        const int64_t middle = (i + end) / 2;
        (p.first_task[middle] <= task ? i : end) = middle;
      }
      const FoldLayer& layer = p.layers[i];
      const int64_t first = (task - p.first_task[i]) * kFoldRows;
      const int64_t last = layer.out - first < kFoldRows ? layer.out : first + kFoldRows;
      const bool streaming = p.stream && layer.weight != layer.result;
      FASTLORA_FLOAT_TYPES(layer.dtype, T, rows_of<T>(layer, first, last, streaming, mine));
    }
    finish_streams();
  }
  std::free(scratch);
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
