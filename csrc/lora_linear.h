// y = m ∘ (x Wᵀ + ((x Dᵀ) ∘ g) Uᵀ) + b, and y += ((x Dᵀ) ∘ g) Uᵀ.
#pragma once

#include "cpu/isa.h"
#include "tensor.h"

namespace fastlora {

// How the CUDA version computes; the last two take 16-bit dtypes, and GPUs from sm_80 on.
enum class Form : int64_t {
  kTiled,     // two launches of plain arithmetic
  kExtended,  // h by a skinny product, then x·Wᵀ and h·Uᵀ as one sum on tensor cores
  kAppended   // D's rows ride along with W, and h is used from registers: ranks up to 32
};

// Operands of both operators. The CPU's lora_linear wants the elements of W's, D's and U's rows to
// be neighbours; the CUDA kernels and lora_add_ read x, D, U (and W) through their strides.
struct LoraLinear {
  TensorView y;          // [tokens, out], written (lora_add_: read and written)
  TensorView x;          // [tokens, in]; without `down`: [tokens, rank]
  TensorView weight;     // [out, in], undefined: accumulate into y
  TensorView bias;       // [out] or undefined
  TensorView down;       // [rank, in] or undefined: x is the rank-r activation
  TensorView up;         // [out, rank]
  TensorView gate;       // [rank] or [rows, rank], float32 (float64 with float64 data)
  TensorView row_scale;  // [out] or undefined
  TensorView h;          // [tokens, rank] scratch of the CUDA form, undefined on the CPU
  int64_t tokens = 0, in = 0, out = 0, rank = 0;
  int64_t tokens_per_row = 0;  // tokens that share one row of the gate
  Form form = Form::kTiled;    // of the CUDA version
};

void launch_lora_linear(const LoraLinear& p, void* stream);

// The Python-facing entries: everything as [tokens, ...] matrices, shapes already checked.
void lora_linear(TensorView y, TensorView x, TensorView weight, TensorView bias, TensorView down,
                 TensorView up, TensorView gate, TensorView row_scale, TensorView h, int64_t form);
void lora_add_(TensorView y, TensorView x, TensorView down, TensorView up, TensorView gate,
               TensorView h, int64_t form);  // kTiled or kExtended

}  // namespace fastlora

FASTLORA_DECLARE_CPU(lora_linear_loop, const ::fastlora::LoraLinear& p, bool& out_of_memory)
FASTLORA_DECLARE_CPU(lora_add_tiny_loop, const ::fastlora::LoraLinear& p)
FASTLORA_DECLARE_CPU(lora_add_loop, const ::fastlora::LoraLinear& p, bool& out_of_memory)
