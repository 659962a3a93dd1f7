// Layers as one kernel parameter, and which of them, and which of its tiles, a block works for.
// Included by .cu files only.
#pragma once

#include <vector>

#include "fold.h"
#include "launch.h"
#include "types.cuh"

namespace fastlora {

// What a block computes of a layer's matrix: of W' [out, in], or of G V [out, rank]. Which kernel
// has which tiles is a parameter of everything here. kShortFirst: blocks that run at the same time
// share as much as they can of both factors, for products that read them often; otherwise they
// follow the rows of the memory.
template <int kRows_, int kColumns_, bool kShortFirst_ = false>
struct WeightTiles {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr bool kShortFirst = kShortFirst_;
  template <class Layer>
  __host__ __device__ static int32_t columns(const Layer& p) {
    return p.in;
  }
};

template <int kRows_, int kColumns_, bool kShortFirst_ = false>
struct ProductTiles {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr bool kShortFirst = kShortFirst_;
  template <class Layer>
  __host__ __device__ static int32_t columns(const Layer& p) {
    return p.rank;
  }
};

template <class Tiling, class Layer>
__host__ __device__ __forceinline__ int32_t tiles_down(const Layer& p) {
  return (p.out + Tiling::kRows - 1) / Tiling::kRows;
}

template <class Tiling, class Layer>
__host__ __device__ __forceinline__ int32_t tiles_across(const Layer& p) {
  return (Tiling::columns(p) + Tiling::kColumns - 1) / Tiling::kColumns;
}

// A FoldLayer in 96 bytes, so that a model's fit into the parameters of one launch.
struct DeviceLayer {
  const void* weight;
  void* result;
  const void *down, *up, *gate;
  int32_t weight_stride[2], result_stride[2], down_stride[2], up_stride[2];
  int32_t gate_stride;
  int32_t out, in, rank;
  bool down_wide, up_wide;  // float32 beside a 16-bit weight

  DeviceLayer() = default;
  explicit DeviceLayer(const FoldLayer& p)
      : weight(p.weight),
        result(p.result),
        down(p.down),
        up(p.up),
        gate(p.gate),
        out(p.out),
        in(p.in),
        rank(p.rank),
        down_wide(p.down_dtype != p.dtype),
        up_wide(p.up_dtype != p.dtype) {
    // A stride that nobody takes may be anything; fold_layer has seen the others.
    const int32_t rows[] = {out, out, rank, out}, columns[] = {in, in, in, rank};
    const int64_t* from[] = {p.weight_stride, p.result_stride, p.down_stride, p.up_stride};
    int32_t* to[] = {weight_stride, result_stride, down_stride, up_stride};
    for (int i = 0; i < 4; ++i) {
      to[i][0] = rows[i] > 1 ? int32_t(from[i][0]) : 0;
      to[i][1] = columns[i] > 1 ? int32_t(from[i][1]) : 1;
    }
    gate_stride = rank > 1 ? int32_t(p.gate_stride) : 0;
  }
};
static_assert(sizeof(DeviceLayer) == 96, "a model's fit into 32 KB");

__device__ __forceinline__ float coefficient(const DeviceLayer& p, int64_t k) {
  return static_cast<const float*>(p.gate)[k * p.gate_stride];
}

template <class Layer_, size_t kBytes>
struct LayerGroup {
  using Layer = Layer_;
  static constexpr int kCapacity = int((kBytes - 16) / (sizeof(Layer) + sizeof(int32_t)));
  Layer layers[kCapacity];
  int32_t first_tile[kCapacity + 1];
  int32_t count;
};

static_assert(LayerGroup<DeviceLayer, 32760>::kCapacity == 327 &&
                  sizeof(LayerGroup<DeviceLayer, 32760>) <= 32760,
              "what fold.h and the documentation say");

// A block's part of a layer's matrix.
struct Tile {
  int32_t layer;  // in the group
  int32_t row, column;
};

template <class Tiling, class Group>
__device__ __forceinline__ Tile tile_of(const Group& group, int32_t block) {
  int32_t low = 0, high = group.count;  // first_tile[low] <= block < first_tile[high]
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (group.first_tile[middle] <= block)
      low = middle;
    else
      high = middle;
  }
  const int32_t tile = block - group.first_tile[low];
  const int32_t across = tiles_across<Tiling>(group.layers[low]);
  if (Tiling::kShortFirst) {
    const int32_t down = tiles_down<Tiling>(group.layers[low]);
    if (down < across) return {low, tile % down * Tiling::kRows, tile / down * Tiling::kColumns};
  }
  return {low, tile / across * Tiling::kRows, tile % across * Tiling::kColumns};
}

// How many of kWidth elements from `first` on there are.
__device__ __forceinline__ int elements_left(int32_t first, int32_t end) {
  const int32_t left = end - first;
  return left < kWidth ? (left < 0 ? 0 : left) : kWidth;
}

// Fills groups with layers, and `run(group, tiles)` for each: a small one where it is enough.
template <class Tiling, class Layer, class Run>
void for_each_group(const std::vector<Layer>& layers, const Run& run) {
  using Few = LayerGroup<Layer, kParameterBytes>;
  using Many = LayerGroup<Layer, kLargeParameterBytes>;
  size_t next = 0;
  const auto fill = [&](auto& group) {
    int64_t tiles = 0;
    group.count = 0;
    for (; next < layers.size() && group.count < group.kCapacity; ++next) {
      const int64_t more =
          int64_t(tiles_down<Tiling>(layers[next])) * tiles_across<Tiling>(layers[next]);
      if (more > INT32_MAX)
        throw std::invalid_argument("weights: a layer is too large for one launch");
      if (more == 0) continue;
      if (tiles + more > INT32_MAX) break;
      group.layers[group.count] = layers[next];
      group.first_tile[group.count++] = int32_t(tiles);
      tiles += more;
    }
    group.first_tile[group.count] = int32_t(tiles);
    if (tiles > 0) run(group, dim3(unsigned(tiles)));
  };
  while (next < layers.size()) {
    if (layers.size() - next > Few::kCapacity && takes_large_parameters()) {
      Many group;
      fill(group);
    } else {
      Few group;
      fill(group);
    }
  }
}

}  // namespace fastlora
