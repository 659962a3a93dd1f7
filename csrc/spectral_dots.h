// p_i = u_iᵀ G v_i for every layer of a model: the gradients of its singular values.
#pragma once

#include "cpu/isa.h"
#include "tensor.h"

namespace fastlora {

// One layer as plain numbers; strides are in elements.
struct SpectralDots {
  const void *grad, *u, *vh;  // [out, in], [out, rank], [rank, in]
  float* sums;                // [rank], without gaps
  int64_t grad_stride[2], u_stride[2], vh_stride[2];
  int32_t out, in, rank;
  DType dtype, u_dtype, vh_dtype;  // of grad, of u, of vh
};

// Rows of G whose contributions a kernel sums before it writes anything, at least: `partial` has
// room for rank numbers for each of them.
constexpr int kDotsRows = 32;

void launch_spectral_dots(const SpectralDots* layers, int64_t count, float* partial, int device,
                          void* stream);

// One block of rows on the CPU: sums[i] += sum over o of product[o, i] * u[o, i], in float64 before
// it is added.
struct DotsOfProduct {
  TensorView sums;     // [rank] float64 or float32
  TensorView product;  // [rows, rank], rows contiguous
  TensorView u;        // [rows, rank]
};

// The Python-facing entries, shapes and dtypes already checked. `spectral_dots` is for a GPU's
// layers of one device; `partial` is float32 [sum over layers of rank * ceil(out / kDotsRows)].
void spectral_dots(TensorViews sums, TensorView partial, TensorViews grads, TensorViews us,
                   TensorViews vhs);
void dots_of_product(TensorView sums, TensorView product, TensorView u);

}  // namespace fastlora

FASTLORA_DECLARE_CPU(dots_of_product_loop, const ::fastlora::DotsOfProduct& p)
