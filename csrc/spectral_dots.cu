// p_i = u_iᵀ G v_i for all layers of a device: which kernel computes which of them, the kernel
// without tensor cores, and the sums over what the tiles have found.
#include <algorithm>

#include "spectral_dots_sm80.cuh"
#include "spectral_dots_sm90.cuh"

namespace fastlora {
namespace {

// --- by plain arithmetic: float32, and GPUs without tensor cores
// ----------------------------------

constexpr int kDotRows = 64, kDotColumns = 64, kDotDepth = 16, kDotThreads = 128;
constexpr int kThreadRows = 8, kThreadColumns = 4;  // of the product, that a thread keeps
using PlainDotsTiles = ProductTiles<kDotRows, kDotColumns, true>;

template <class T>
__device__ __forceinline__ float element(const void* matrix, const int32_t (&stride)[2],
                                         int32_t row, int32_t column, bool wide) {
  const int64_t at = int64_t(row) * stride[0] + int64_t(column) * stride[1];
  return wide ? *readable(static_cast<const float*>(matrix) + at)
              : widen(*readable(static_cast<const T*>(matrix) + at));
}

template <class T, class Group>
__global__ void __launch_bounds__(kDotThreads, 4)
    spectral_dots_kernel(const __grid_constant__ Group group) {
  FASTLORA_SHARED(g, float[kDotDepth][kDotRows + 4]);
  FASTLORA_SHARED(v, float[kDotDepth][kDotColumns + 4]);
  const Tile tile = tile_of<PlainDotsTiles>(group, int32_t(blockIdx.x));
  const auto& p = group.layers[tile.layer];
  const int thread = int(threadIdx.x);
  constexpr int kAcross = kDotColumns / kThreadColumns;
  const int my_row = thread / kAcross * kThreadRows, my_column = thread % kAcross * kThreadColumns;
  float sum[kThreadRows][kThreadColumns] = {};
  for (int32_t k0 = 0; k0 < p.in; k0 += kDotDepth) {
    __syncthreads();  // the last step is no longer read
#pragma unroll
    for (int e = thread; e < kDotRows * kDotDepth; e += kDotThreads) {
      const int32_t at = e / kDotDepth, k = k0 + e % kDotDepth;
      static_assert(kDotRows == kDotColumns, "one loop for both");
      const bool there = k < p.in;
      g[e % kDotDepth][at] = there && tile.row + at < p.out
                                 ? element<T>(p.grad, p.grad_stride, tile.row + at, k, false)
                                 : 0.0f;
      v[e % kDotDepth][at] = there && tile.column + at < p.rank
                                 ? element<T>(p.vh, p.vh_stride, tile.column + at, k, p.vh_wide)
                                 : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDotDepth; ++k)
#pragma unroll
      for (int m = 0; m < kThreadRows; ++m)
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j)
          sum[m][j] += g[k][my_row + m] * v[k][my_column + j];
  }
  FASTLORA_SHARED(columns, float[kDotRows / kThreadRows][kDotColumns]);
#pragma unroll
  for (int j = 0; j < kThreadColumns; ++j) {
    float dot = 0.0f;
    const int32_t column = tile.column + my_column + j;
#pragma unroll
    for (int m = 0; m < kThreadRows; ++m) {
      const int32_t row = tile.row + my_row + m;
      if (row < p.out && column < p.rank)
        dot += sum[m][j] * element<T>(p.u, p.u_stride, row, column, p.u_wide);
    }
    columns[my_row / kThreadRows][my_column + j] = dot;
  }
  __syncthreads();
  if (thread >= kDotColumns || tile.column + thread >= p.rank) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kDotRows / kThreadRows; ++i) total += columns[i][thread];
  *writable(p.partial + int64_t(tile.row / kDotRows) * p.rank + tile.column + thread) = total;
}

// --- the second launch
// ----------------------------------------------------------------------------

constexpr int kSumThreads = 128;

struct SumTiles : ProductTiles<1, kSumThreads> {
  template <class Layer>
  __host__ __device__ static int32_t rows(const Layer&) {
    return 1;
  }
};

template <class Group>
__global__ void __launch_bounds__(kSumThreads)
    spectral_sums_kernel(const __grid_constant__ Group group) {
  const Tile tile = tile_of<SumTiles>(group, int32_t(blockIdx.x));
  const auto& p = group.layers[tile.layer];
  const int32_t column = tile.column + int32_t(threadIdx.x);
  if (column >= p.rank) return;
  double sum = 0;
  for (int32_t part = 0; part < p.parts; ++part)
    sum += double(*readable(p.partial + int64_t(part) * p.rank + column));
  *writable(p.sums + column) = float(sum);
}

// --- which kernel
// ---------------------------------------------------------------------------------

// Gives the layers their places in `partial`, which moves on.
template <class Tiling>
void place_parts(std::vector<DeviceDots>& layers, float*& partial) {
  static_assert(Tiling::kRows % kDotsRows == 0, "what the caller made room for");
  for (DeviceDots& p : layers) {
    p.parts = tiles_down<Tiling>(p);
    p.partial = partial;
    partial += int64_t(p.parts) * p.rank;
  }
  // Blocks of one depth take one time: the long ones first, the short ones fill the gaps.
  std::stable_sort(layers.begin(), layers.end(),
                   [](const auto& a, const auto& b) { return a.in > b.in; });
}

// Layers of one dtype; `partial` moves on.
template <class T>
void launch_spectral_dots(const std::vector<DeviceDots>& layers, float*& partial,
                          std::vector<DeviceDots>& done, void* stream) {
  std::vector<DeviceDots> plain;
  if constexpr (sizeof(T) == 2) {
    std::vector<DeviceDots> wide, products;
    using Few = LayerGroup<DeviceDots, kParameterBytes>;
    const bool tensor_cores = has_tensor_cores(spectral_dots_sm80_kernel<T, Few>);
    const bool warpgroups = has_spectral_dots_sm90<T>();
    for (const DeviceDots& p : layers)
      (warpgroups && takes_spectral_sm90(p)     ? wide
       : tensor_cores && takes_spectral_sm80(p) ? products
                                                : plain)
          .push_back(p);
    place_parts<sm90::DotsTiling>(wide, partial);
    launch_spectral_dots_sm90<T>(wide, stream);
    done.insert(done.end(), wide.begin(), wide.end());
    place_parts<DotsTiles>(products, partial);
    launch_spectral_dots_sm80<T>(products, stream);
    done.insert(done.end(), products.begin(), products.end());
  } else {
    plain = layers;
  }
  place_parts<PlainDotsTiles>(plain, partial);
  for_each_group<PlainDotsTiles>(plain, [&](const auto& group, dim3 tiles) {
    launch("spectral_dots", spectral_dots_kernel<T, std::decay_t<decltype(group)>>, tiles,
           dim3(kDotThreads), 0, stream, group);
  });
  done.insert(done.end(), plain.begin(), plain.end());
}

}  // namespace

void launch_spectral_dots(const SpectralDots* layers, int64_t count, float* partial, int device,
                          void* stream) {
  const DeviceGuard guard(device);
  std::vector<DeviceDots> group, done;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    group.clear();
    for (int64_t i = 0; i < count; ++i)
      if (layers[i].dtype == dtype) group.emplace_back(layers[i]);
    switch (dtype) {
      case DType::kFloat16: launch_spectral_dots<__half>(group, partial, done, stream); break;
      case DType::kBFloat16:
        launch_spectral_dots<__nv_bfloat16>(group, partial, done, stream);
        break;
      default: launch_spectral_dots<float>(group, partial, done, stream);
    }
  }
  for_each_group<SumTiles>(done, [&](const auto& group, dim3 tiles) {
    launch("spectral_sums", spectral_sums_kernel<std::decay_t<decltype(group)>>, tiles,
           dim3(kSumThreads), 0, stream, group);
  });
}

}  // namespace fastlora
