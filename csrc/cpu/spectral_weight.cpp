// What precedes the matrix products of spectral_weight: the scaling of U's columns.
#include "../spectral_weight.h"

#include "scalar.h"

namespace fastlora {
namespace FASTLORA_ISA {
namespace {

constexpr int64_t kElementsPerParallel = 1 << 16;  // fewer than this are faster on one thread

template <class T>
void scale_columns(const ScaledColumns& p) {
  using A = Acc<T>;
  const int64_t rows = p.u.shape[0], rank = p.u.shape[1];
  const int64_t row_stride = p.u.strides[0], column_stride = p.u.strides[1];
  const A* c = static_cast<const A*>(p.coefficient);
#pragma omp parallel for schedule(static) if (rows * rank >= kElementsPerParallel)
  for (int64_t row = 0; row < rows; ++row) {
    const T* u = p.u.ptr<const T>() + row * row_stride;
    T* scaled = p.scaled.ptr<T>() + row * rank;
    if (column_stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < rank; ++i) store(scaled + i, A(load(u + i)) * c[i]);
    } else {
      for (int64_t i = 0; i < rank; ++i) store(scaled + i, A(load(u + i * column_stride)) * c[i]);
    }
  }
}

}  // namespace

void scale_columns_loop(const ScaledColumns& p) {
  FASTLORA_FLOAT_TYPES(p.u.dtype, T, scale_columns<T>(p));
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
