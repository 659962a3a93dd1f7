// x' = c_x x + c_0 clip(k_x x + k_e e) + c_e e + c_h h + c_n z with e = sum_j w_j e_j, h' likewise,
// and the next model input m x'. The formula and its letters: fastlora/ops/sampler_step.py.
#pragma once

#include "cpu/isa.h"
#include "tensor.h"

namespace fastlora {

constexpr int kMaxOutputs = 16;
constexpr int kTableColumns = 12;

// All tensors contiguous; a sample is `inner` consecutive elements. Plain pointers, so that the
// same struct is a kernel's argument.
struct SamplerStep {
  const void* x;                     // [batch, inner] float32 | float64
  const void* outputs[kMaxOutputs];  // n of [batch, inner]
  const void* weights;               // [weight_steps, n, weight_batch]
  const void* table;                 // [steps, 12]
  const int64_t* step;               // []
  const void* history;               // [batch, inner] or null
  const int64_t* seeds;              // [batch] or null: no noise
  void* x_next;                      // [batch, inner]
  void* history_next;                // [batch, inner] or null
  void* model_input;                 // [copies, batch, inner]
  int64_t batch, inner, steps, weight_steps, weight_batch, copies;
  int32_t n;
  DType x_dtype, output_dtype, input_dtype, weights_dtype, table_dtype;
};

void launch_sampler_step(const SamplerStep& p, int device, void* stream);

// The Python-facing entry: writes x_next, history_next (undefined: none) and model_input.
void sampler_step(TensorView x_next, TensorView history_next, TensorView model_input, TensorView x,
                  TensorViews outputs, TensorView weights, TensorView table, TensorView step,
                  TensorView history, TensorView seeds, int64_t copies);

}  // namespace fastlora

FASTLORA_DECLARE_CPU(sampler_step_loop, const ::fastlora::SamplerStep& p)
