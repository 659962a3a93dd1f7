// W' = W + U diag(g) D for every layer of a model.
#pragma once

#include "cpu/isa.h"
#include "tensor.h"

namespace fastlora {

// One layer as plain numbers: what the CPU loop and the CUDA kernel read. Strides are in elements.
struct FoldLayer {
  const void* weight;  // [out, in]
  void* result;        // [out, in], the same memory as `weight` or none of it
  const void* down;    // [rank, in]
  const void* up;      // [out, rank]
  const void* gate;    // [rank], float32 (float64 beside float64)
  int64_t weight_stride[2], result_stride[2], down_stride[2], up_stride[2];
  int64_t gate_stride;
  int32_t out, in, rank;
  DType dtype, down_dtype, up_dtype;  // of weight and result, of down, of up
};

// All layers of one parallel region: tasks of kFoldRows rows, those of layer i from first_task[i]
// on.
constexpr int64_t kFoldRows = 48;
struct FoldTasks {
  const FoldLayer* layers;
  int64_t count;
  const int64_t* first_task;  // [count + 1]
  bool stream;                // write past the caches
  bool out_of_memory;         // set where the packed operands found no room
};

// Layers of one device: a launch for each dtype, and for every 327 layers of it, as many as travel
// as parameters of a kernel. (A table in device memory would be written by as many launches.)
void launch_fold(const FoldLayer* layers, int64_t count, int device, void* stream);

// Runs prepared CPU layers: shared with spectral_weight.
void fold_on_cpu(const FoldLayer* layers, int64_t count);

// The layer of `result = weight + up diag(gate) down` after the checks that only C++ can make.
FoldLayer fold_layer(const char* op, const TensorView& weight, const TensorView& down,
                     const TensorView& up, const TensorView& gate, const TensorView& result);

// The Python-facing entry, shapes and dtypes already checked.
void fold(TensorViews weights, TensorViews downs, TensorViews ups, TensorViews gates,
          TensorViews outs);

}  // namespace fastlora

FASTLORA_DECLARE_CPU(fold_loop, ::fastlora::FoldTasks& p)
