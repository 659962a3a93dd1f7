// One row of a solver's table: x' = c_x x + c_0 x0 + c_e e + c_h h + c_r r + c_n z with the guided
// output e and x0 = clip(k_x x + k_e e), what the history remembers, and the next model input m x'.
// The formula and its letters: fastlora/ops/sampler_step.py.
#pragma once

#include "cpu/isa.h"
#include "tensor.h"

namespace fastlora {

constexpr int kMaxOutputs = 16;

// COLUMNS of fastlora/ops/sampler_step.py.
// clang-format off
enum Column {
  kKx, kKe,
  kCx, kC0, kCe, kCh, kCr, kCn,
  kGx, kG0, kGe, kGh, kGr,
  kRx, kR0, kRe, kRh, kRr,
  kP0, kPe,
  kM, kClip,
  kTableColumns
};
// clang-format on

// All tensors contiguous; a sample is `inner` consecutive elements; "wide" is float32, or float64
// where x is. Plain pointers, so that the same struct is a kernel's argument.
struct SamplerStep {
  const void* x;                     // [batch, inner]
  const void* outputs[kMaxOutputs];  // n of [batch, inner]
  const void* weights;               // [weight_steps, n, weight_batch]
  const void* table;                 // [steps, 22]
  const int64_t* step;               // []
  const void* history;               // [histories, batch, inner] wide, or null
  const int64_t* seeds;              // [batch] or null
  const void* noise;                 // [batch, inner] wide, or null
  const void* rescale;               // [rescale_batch] wide, or null
  const void* mask;                  // [mask_batch, mask_period] wide, or null
  const void* known;                 // [batch, inner] wide, beside mask
  void* x_next;                      // [batch, inner], x's type
  void* history_next;                // [histories, batch, inner] wide
  void* model_input;                 // [copies, batch, inner]
  void* statistics;                  // [batch, 2] wide: by what e is multiplied, where x0 is cut
  int64_t batch, inner, steps, weight_steps, weight_batch, rescale_batch, copies;
  int64_t mask_batch, mask_period;  // element i of a sample has the mask's i % mask_period
  int64_t rank;                     // the quantile lies between this element and the next one,
  double between;                   // so far from this one
  double threshold_max;
  int32_t n, histories;
  bool dynamic;  // dynamic thresholding
  DType x_dtype, output_dtype, input_dtype, weights_dtype, table_dtype;

  bool reduces() const { return rescale != nullptr || dynamic; }
};

void launch_sampler_step(const SamplerStep& p, int device, void* stream);
// What has to be known of a whole sample first: fills `statistics`.
void launch_sampler_statistics(const SamplerStep& p, int device, void* stream);

// The Python-facing entry: writes x_next, history_next (undefined: none) and model_input.
// `statistics` is scratch memory, which the CPU has its own of.
void sampler_step(TensorView x_next, TensorView history_next, TensorView model_input,
                  TensorView statistics, TensorView x, TensorViews outputs, TensorView weights,
                  TensorView table, TensorView step, TensorView history, TensorView seeds,
                  TensorView noise, TensorView rescale, TensorView mask, TensorView known,
                  double quantile, double threshold_max, int64_t copies);

constexpr int64_t kSamplerChunk = 1024;  // elements that a CPU's loop handles at a time

// Memory of the CPU's statistics beside [batch, 2] of them.
struct SamplerScratch {
  double* moments;  // [batch, chunks, 4]: mean and squared deviations of e_0, and of e
  void* values;     // [batch, inner] wide: the bits of |x0| before it is cut
};

}  // namespace fastlora

FASTLORA_DECLARE_CPU(sampler_step_loop, const ::fastlora::SamplerStep& p)
FASTLORA_DECLARE_CPU(sampler_statistics_loop, const ::fastlora::SamplerStep& p,
                     const ::fastlora::SamplerScratch& scratch)
