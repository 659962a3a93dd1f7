// TensorView: what a kernel sees of a torch.Tensor, obtained through DLPack's C exchange API.
// No torch, no Python: the Python side lives in python_tensor.h.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dlpack.h"

namespace fastlora {

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16, kFloat64, kInt64, kOther };

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat64: return "float64";
    case DType::kInt64: return "int64";
    default: return "an unsupported dtype";
  }
}

inline DType dtype_of(DLDataType t) {
  if (t.lanes != 1) return DType::kOther;
  if (t.code == kDLFloat && t.bits == 32) return DType::kFloat32;
  if (t.code == kDLFloat && t.bits == 16) return DType::kFloat16;
  if (t.code == kDLBfloat && t.bits == 16) return DType::kBFloat16;
  if (t.code == kDLFloat && t.bits == 64) return DType::kFloat64;
  if (t.code == kDLInt && t.bits == 64) return DType::kInt64;
  return DType::kOther;
}

// A borrowed view. `defined` is false for an optional argument that was None.
struct TensorView {
  void* data = nullptr;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;  // in elements
  int32_t ndim = 0;
  DType dtype = DType::kOther;
  DLDevice device{kDLCPU, 0};
  bool defined = false;

  int64_t numel() const {
    int64_t n = 1;
    for (int32_t i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  bool contiguous() const {
    if (numel() == 0) return true;  // whatever its strides say, as in torch
    int64_t expected = 1;
    for (int32_t i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
  bool aligned(int64_t bytes) const { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }
#ifdef FASTLORA_EMULATED
  bool cpu() const { return false; }  // this machine's memory is that of the emulated GPU
#else
  bool cpu() const { return device.device_type == kDLCPU; }
#endif
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

inline std::string describe(const TensorView& t) {
  std::ostringstream s;
  s << name_of(t.dtype) << " [";
  for (int32_t i = 0; i < t.ndim; ++i) s << (i ? ", " : "") << t.shape[i];
  s << "] strides [";
  for (int32_t i = 0; i < t.ndim; ++i) s << (i ? ", " : "") << t.strides[i];
  const bool cpu = t.device.device_type == kDLCPU;
  s << "] on " << (cpu ? "cpu" : "device ");
  if (!cpu) s << t.device.device_type << ":" << t.device.device_id;
  return s.str();
}

// Checks that print themselves: operator, argument, expected, got. ValueError in Python.
#define FASTLORA_CHECK(condition, op, argument, expected, view)                         \
  do {                                                                                  \
    if (!(condition))                                                                   \
      throw std::invalid_argument(std::string(op) + ": " + (argument) + ": expected " + \
                                  (expected) + ", got " + ::fastlora::describe(view));  \
  } while (0)

// What only C++ can see of an argument: real memory (fake and functional tensors arrive as null)
// and the device of the others.
inline void check_memory(const char* op, const char* argument, const TensorView& t,
                         const TensorView& like) {
  if (!t.defined) return;
  FASTLORA_CHECK(t.data != nullptr || t.numel() == 0, op, argument, "a tensor with memory", t);
  FASTLORA_CHECK(t.device.device_type == like.device.device_type &&
                     t.device.device_id == like.device.device_id,
                 op, argument, "the device of the other arguments", t);
}

inline void check_contiguous(const char* op, const char* argument, const TensorView& t) {
  FASTLORA_CHECK(!t.defined || t.contiguous(), op, argument, "a contiguous tensor", t);
}

// The CUDA stream (a cudaStream_t) on which torch currently queues work of t's device.
void* current_stream(const TensorView& t);

// Lets other Python threads run while a long CPU loop does.
class WithoutGil {
 public:
  WithoutGil();
  ~WithoutGil();
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  void* state_;
};

using TensorViews = std::vector<TensorView>;

}  // namespace fastlora
