// What follows the matrix products of spectral_dots: u_iᵀ (G v_i) over a block of rows.
#include "../spectral_dots.h"

#include "scalar.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

constexpr int64_t kElementsPerParallel = 1 << 16;  // fewer than this are faster on one thread
constexpr int64_t kColumns = 64;                   // of the sums that one task keeps

// Columns are divided among the threads, so the order of every sum is fixed.
template <class T, class S>
void dots(const DotsOfProduct& p) {
  const int64_t rows = p.product.shape[0], rank = p.product.shape[1];
  const int64_t product_stride = p.product.strides[0];
  const int64_t row_stride = p.u.strides[0], column_stride = p.u.strides[1];
  const int64_t tasks = (rank + kColumns - 1) / kColumns;
  S* sums = p.sums.ptr<S>();
#pragma omp parallel for schedule(static) if (rows * rank >= kElementsPerParallel)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t first = task * kColumns;
    const int64_t count = rank - first < kColumns ? rank - first : kColumns;
    double sum[kColumns] = {};
    for (int64_t row = 0; row < rows; ++row) {
      const T* a = p.product.ptr<const T>() + row * product_stride + first;
      const T* b = p.u.ptr<const T>() + row * row_stride + first * column_stride;
      if (column_stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) sum[i] += double(load(a + i)) * double(load(b + i));
      } else {
        for (int64_t i = 0; i < count; ++i)
          sum[i] += double(load(a + i)) * double(load(b + i * column_stride));
      }
    }
    for (int64_t i = 0; i < count; ++i) sums[first + i] = S(sums[first + i] + sum[i]);
  }
}

}  // namespace

void dots_of_product_loop(const DotsOfProduct& p) {
  const bool wide = p.sums.dtype == DType::kFloat64;
  FASTLORA_FLOAT_TYPES(p.product.dtype, T, wide ? dots<T, double>(p) : dots<T, float>(p));
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
