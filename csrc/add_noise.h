// x_t = alpha x0 + sigma eps, target = p_0 x0 + p_e eps, each sample with the row t of the table.
#pragma once

#include "cpu/isa.h"
#include "tensor.h"

namespace fastlora {

// All tensors contiguous; a sample is `inner` consecutive elements.
struct AddNoise {
  const void* x0;        // [batch, inner] T
  const void* noise;     // [batch, inner] T, or null: from seeds
  const int64_t* seeds;  // [batch] or null
  const int64_t* t;      // [batch]
  const void* table;     // [steps, 4]
  void* x_t;             // [batch, inner] T
  void* target;          // [batch, inner] T
  int64_t batch, inner, steps;
  DType dtype, table_dtype;
};

void launch_add_noise(const AddNoise& p, int device, void* stream);

// The Python-facing entry: writes x_t and target.
void add_noise(TensorView x_t, TensorView target, TensorView x0, TensorView noise, TensorView seeds,
               TensorView t, TensorView table);

}  // namespace fastlora

FASTLORA_DECLARE_CPU(add_noise_loop, const ::fastlora::AddNoise& p)
