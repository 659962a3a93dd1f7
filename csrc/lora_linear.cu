// The low-rank linear layer in three forms. Tiled: h = (x Dᵀ) ∘ g by a skinny product, then one
// with two sources of K, x·Wᵀ and h·Uᵀ, into the same float accumulators; any dtype, any GPU.
// Extended: the same two launches on tensor cores. Appended: one launch, h made and used in
// registers.
#include <stdexcept>

#include "gemm_sm80.cuh"
#include "heuristics.h"
#include "launch.h"
#include "lora_linear.h"
#include "types.cuh"

namespace fastlora {
namespace {

constexpr int kTileTokens = 64, kTileK = 32;
constexpr int kTileOut = 64, kTileRank = 16;  // the widths of a tile of y and of h
constexpr int kSide = 16;                     // threads along each side of a block
constexpr int kBlock = kSide * kSide;
constexpr int kMine = kTileTokens / kSide;  // tokens of one thread
constexpr int kPad = 4;                     // keeps rows of shared memory 16-byte aligned

// Rows first_row.. and k0.. of an operand, as tile[k][row]; zeros beyond its edges.
template <class T, int kRows>
__device__ __forceinline__ void load_tile(float (&tile)[kTileK][kRows + kPad], const Operand<T>& p,
                                          int64_t first_row, int64_t k0, int64_t k_end) {
  const int thread = int(threadIdx.x);
  if (p.k_stride == 1) {  // a thread takes eight elements of a row, as one or two vectors
    constexpr int kGroups = kTileK / kWidth;
    for (int g = thread; g < kRows * kGroups; g += kBlock) {
      const int row = g / kGroups, k = g % kGroups * kWidth;
      const int64_t left = first_row + row < p.rows ? k_end - k0 - k : 0;
      const int count = left < kWidth ? (left < 0 ? 0 : int(left)) : kWidth;
      float v[kWidth];
      load_strided(p.data + (first_row + row) * p.row_stride + k0 + k, 1, count, v);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) tile[k + i][row] = v[i];
    }
    return;
  }
  // Neighbouring threads take neighbouring rows, which are contiguous in a transposed operand.
  for (int e = thread; e < kRows * kTileK; e += kBlock) {
    const int row = e % kRows, k = e / kRows;
    const bool inside = first_row + row < p.rows && k0 + k < k_end;
    const int64_t at = (first_row + row) * p.row_stride + (k0 + k) * p.k_stride;
    tile[k][row] = inside ? widen(p.data[at]) : 0.0f;
  }
}

template <int kCount>
__device__ __forceinline__ void read(const float* from, float (&to)[kCount]) {
  if constexpr (kCount == 4)
    *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(from);
  else
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
}

// sum += a · bᵀ for the tile at (first_token, first_column).
template <class T, int kColumns>
__device__ __forceinline__ void accumulate(float (&sum)[kMine][kColumns / kSide],
                                           const Source<T>& p, int64_t first_token,
                                           int64_t first_column) {
  constexpr int kWide = kColumns / kSide;  // columns of one thread
  FASTLORA_SHARED(a, float[kTileK][kTileTokens + kPad]);
  FASTLORA_SHARED(b, float[kTileK][kColumns + kPad]);
  const int my_token = int(threadIdx.x) / kSide * kMine;
  const int my_column = int(threadIdx.x) % kSide * kWide;
  for (int64_t k0 = 0; k0 < p.k; k0 += kTileK) {
    __syncthreads();  // the last tiles are no longer read
    load_tile<T, kTileTokens>(a, p.a, first_token, k0, p.k);
    load_tile<T, kColumns>(b, p.b, first_column, k0, p.k);
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kTileK; ++k) {
      float u[kMine], v[kWide];
      read(&a[k][my_token], u);
      read(&b[k][my_column], v);
#pragma unroll
      for (int i = 0; i < kMine; ++i)
#pragma unroll
        for (int j = 0; j < kWide; ++j) sum[i][j] += u[i] * v[j];
    }
  }
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kBlock, 2)
    lora_linear_kernel(const __grid_constant__ Problem<T> p) {
  constexpr int kWide = kColumns / kSide;
  const int64_t first_token = int64_t(blockIdx.x) * kTileTokens;
  const int64_t first_column = int64_t(blockIdx.y) * kColumns;
  float sum[kMine][kWide] = {};
  accumulate<T, kColumns>(sum, p.first, first_token, first_column);
  if constexpr (kColumns == kTileOut)
    accumulate<T, kColumns>(sum, p.second, first_token, first_column);

  const int64_t token = first_token + int(threadIdx.x) / kSide * kMine;
  const int64_t column = first_column + int(threadIdx.x) % kSide * kWide;
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    if (column + j >= p.columns) return;
    const float scale =
        p.row_scale != nullptr ? widen(p.row_scale[(column + j) * p.row_scale_stride]) : 1.0f;
    const float bias = p.bias != nullptr ? widen(p.bias[(column + j) * p.bias_stride]) : 0.0f;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (token + i >= p.tokens) break;
      T* y = p.y + (token + i) * p.y_stride[0] + (column + j) * p.y_stride[1];
      float v = sum[i][j];
      if (p.gate != nullptr)
        v *= p.gate[(token + i) / p.tokens_per_row * p.gate_stride[0] +
                    (column + j) * p.gate_stride[1]];
      if (p.add) v += widen(*y);
      if (p.row_scale != nullptr) v *= scale;
      if (p.bias != nullptr) v += bias;
      narrow(v, y);
    }
  }
}

// h = x ∘ g, where x is the rank-r activation already.
template <class T>
__global__ void __launch_bounds__(kBlock)
    gate_kernel(T* h, Operand<T> x, const float* gate, int64_t gate_row, int64_t gate_column,
                int64_t tokens_per_row, int64_t rank) {
  const int64_t total = x.rows * rank;
  for (int64_t e = int64_t(blockIdx.x) * kBlock + threadIdx.x; e < total;
       e += int64_t(gridDim.x) * kBlock) {
    const int64_t token = e / rank, r = e % rank;
    narrow(widen(x.data[token * x.row_stride + r * x.k_stride]) *
               gate[token / tokens_per_row * gate_row + r * gate_column],
           h + e);
  }
}

template <class T>
Operand<T> operand(const TensorView& t) {
  return {t.ptr<const T>(), t.shape[0], t.strides[0], t.strides[1]};
}

template <class T, int kColumns>
void launch_product(const Problem<T>& p, void* stream) {
  const int64_t x = (p.tokens + kTileTokens - 1) / kTileTokens;
  const int64_t y = (p.columns + kColumns - 1) / kColumns;
  if (x > INT32_MAX || y > 65535)
    throw std::invalid_argument("lora_linear: x: too many tokens or outputs for one launch");
  launch("lora_linear", lora_linear_kernel<T, kColumns>, dim3(unsigned(x), unsigned(y)),
         dim3(kBlock), 0, stream, p);
}

// Shapes of a tile, rows x columns; heuristics.h reckons with them.
template <int kAppended>
using Large = Shape<4, 2, kAppended ? 12 : 16, kAppended, 3>;  // 128 x 128, 96 beside h's sums
template <int kAppended>
using Small = Shape<4, 1, 8, kAppended, 3>;  // 64 x 64
using Skinny = Shape<4, 1, 2, 0, 4>;         // 64 x 16

template <class T>
bool few(const Problem<T>& p) {
  return takes_small_tiles(p.tokens, p.columns);
}

template <class T>
struct OnTensorCores {
  // `in` of x and D; 0: h is there already, written by the kernel before.
  static void extended(Problem<T> p, const Operand<T>& x, const Operand<T>& down, int64_t in, T* h,
                       void* stream) {
    p.dependent = p.second.k > 0;
    if (p.second.k > 0 && in > 0) {
      Problem<T> skinny{};
      skinny.first = {x, down, in};
      skinny.y = h;
      skinny.tokens = p.tokens;
      skinny.columns = p.second.k;
      skinny.y_stride[0] = p.second.k;
      skinny.y_stride[1] = 1;
      skinny.gate = p.gate;
      skinny.gate_stride[0] = p.gate_stride[0];
      skinny.gate_stride[1] = p.gate_stride[1];
      skinny.tokens_per_row = p.tokens_per_row;
      if (p.second.k <= 16)
        launch_gemm<T, Skinny>("gated activation", skinny, stream);
      else
        launch_gemm<T, Small<0>>("gated activation", skinny, stream);
    }
    p.gate = nullptr;
    if (few(p))
      launch_gemm<T, Small<0>>("extended product", p, stream);
    else
      launch_gemm<T, Large<0>>("extended product", p, stream);
  }
  static void appended(Problem<T> p, void* stream) {
    const char* name = "appended product";
    if (p.second.k <= 16)
      few(p) ? launch_gemm<T, Small<16>>(name, p, stream)
             : launch_gemm<T, Large<16>>(name, p, stream);
    else
      few(p) ? launch_gemm<T, Small<32>>(name, p, stream)
             : launch_gemm<T, Large<32>>(name, p, stream);
  }
};

template <class T>
void run(const LoraLinear& v, void* stream) {
  const bool gate_rows = v.gate.ndim == 2;
  const int64_t gate_row = gate_rows ? v.gate.strides[0] : 0;
  const int64_t gate_column = v.gate.strides[gate_rows ? 1 : 0];
  const bool tensor_cores = v.form != Form::kTiled;
  if (v.rank == 0 && !v.weight.defined) return;  // nothing is added
  if (tensor_cores && v.down.defined) {
    // nothing: h is made by the other forms themselves
  } else if (v.rank > 0 && v.down.defined) {
    Problem<T> p{};
    p.first = {operand<T>(v.x), operand<T>(v.down), v.in};
    p.y = v.h.ptr<T>();
    p.tokens = v.tokens;
    p.columns = v.rank;
    p.y_stride[0] = v.h.strides[0];
    p.y_stride[1] = v.h.strides[1];
    p.gate = v.gate.ptr<const float>();
    p.gate_stride[0] = gate_row;
    p.gate_stride[1] = gate_column;
    p.tokens_per_row = v.tokens_per_row;
    launch_product<T, kTileRank>(p, stream);
  } else if (v.rank > 0) {
    const int64_t blocks = (v.tokens * v.rank + kBlock - 1) / kBlock;
    launch("gate", gate_kernel<T>, dim3(unsigned(blocks < 65536 ? blocks : 65536)), dim3(kBlock), 0,
           stream, v.h.ptr<T>(), operand<T>(v.x), v.gate.ptr<const float>(), gate_row, gate_column,
           v.tokens_per_row, v.rank);
  }
  Problem<T> p{};
  if (v.weight.defined) p.first = {operand<T>(v.x), operand<T>(v.weight), v.in};
  if (v.rank > 0)
    p.second = {v.h.defined ? operand<T>(v.h) : Operand<T>{}, operand<T>(v.up), v.rank};
  p.y = v.y.ptr<T>();
  p.tokens = v.tokens;
  p.columns = v.out;
  p.y_stride[0] = v.y.strides[0];
  p.y_stride[1] = v.y.strides[1];
  p.add = !v.weight.defined;
  if (v.bias.defined) {
    p.bias = v.bias.ptr<const T>();
    p.bias_stride = v.bias.strides[0];
  }
  if (v.row_scale.defined) {
    p.row_scale = v.row_scale.ptr<const T>();
    p.row_scale_stride = v.row_scale.strides[0];
  }
  if constexpr (!std::is_same_v<T, float>) {
    if (tensor_cores) {
      p.gate = v.gate.ptr<const float>();
      p.gate_stride[0] = gate_row;
      p.gate_stride[1] = gate_column;
      p.tokens_per_row = v.tokens_per_row;
      const Operand<T> x = operand<T>(v.x);
      const Operand<T> down = v.down.defined ? operand<T>(v.down) : Operand<T>{};
      if (v.form == Form::kExtended)
        return OnTensorCores<T>::extended(p, x, down, v.down.defined ? v.in : 0, v.h.ptr<T>(),
                                          stream);
      p.appended = down;
      p.second.a = {};
      return OnTensorCores<T>::appended(p, stream);
    }
  }
  launch_product<T, kTileOut>(p, stream);
}

}  // namespace

void launch_lora_linear(const LoraLinear& p, void* stream) {
  const DeviceGuard guard(p.y.device.device_id);
  switch (p.y.dtype) {
    case DType::kFloat32: return run<float>(p, stream);
    case DType::kFloat16: return run<__half>(p, stream);
    case DType::kBFloat16: return run<__nv_bfloat16>(p, stream);
    default:
      throw std::invalid_argument(
          std::string("lora_linear: x: expected float32, float16 or bfloat16 on CUDA, got ") +
          name_of(p.y.dtype));
  }
}

}  // namespace fastlora
