// p_i = u_iᵀ G v_i on warpgroups (sm_90a), for 16-bit layers whose rows are aligned: G V by wgmma,
// both from shared memory, multiplied with U where it lies, in registers, and summed over the rows
// of a tile. Included by .cu files only.
#pragma once

#include "spectral_layer.cuh"
#include "spectral_tile_sm90.cuh"

namespace fastlora {
namespace sm90 {

struct DotsTiling : ProductTiles<kRows, kColumns, true> {
  template <class Layer>
  __host__ __device__ static int32_t depth(const Layer& p) {
    return p.in;
  }
};

constexpr int kWarps = kComputing / 32;
// What the warps have found for the columns of a tile, and of the next one.
using WarpDots = float[2][kWarps][kColumns];
constexpr int kDotsShared = kStagesBytes + int(sizeof(WarpDots));

// What copying warp `part` does.
template <class T, class Group>
__device__ __forceinline__ void copy_dots(const Group& group, char* stages, int part) {
  constexpr int kMyRows = kRows / kParts, kMyColumns = kColumns / kParts;
  copy_all_steps<DotsTiling>(group, [&](const auto& at, int stage, auto wait) {
    const DeviceDots& p = group.layers[at.tile.layer];
    char* const to = stages + stage * kStageBytes;
    const int32_t row = at.tile.row + part * kMyRows, k0 = at.step * kDepth;
    wait();
    if (at.step >= at.products) {
      copy_rows<T, kMyRows, 16>(to + part * kMyRows * 256, {p.u, p.u_stride[0], p.out, p.rank}, row,
                                at.tile.column + (at.step - at.products) * kHalf);
      return;
    }
    copy_rows<T, kMyRows, 8>(to + part * kMyRows * 128, {p.grad, p.grad_stride[0], p.out, p.in},
                             row, k0);
    copy_rows<T, kMyColumns, 8>(to + kLeftBytes + part * kMyColumns * 128,
                                {p.vh, p.vh_stride[0], p.rank, p.in},
                                at.tile.column + part * kMyColumns, k0);
  });
}

// Adds values of two lanes whose numbers differ in kBit: each keeps the sums of one half of them.
template <int kLeft, int kBit, int kCount>
__device__ __forceinline__ void add_lanes(float (&values)[kCount]) {
  const bool upper = (threadIdx.x & kBit) != 0;
#pragma unroll
  for (int i = 0; i < kLeft; ++i) {
    const float mine = upper ? values[kLeft + i] : values[i];
    const float other = upper ? values[i] : values[kLeft + i];
    values[i] = mine + __shfl_xor_sync(0xffffffffu, other, kBit);
  }
}

// Adds up the lanes of equal lane % 4, in a fixed order: lane l has the sums of
// values[kCount / 8 * (l / 4)] and on, in the first places.
template <int kCount>
__device__ __forceinline__ void add_up_rows(float (&values)[kCount]) {
  add_lanes<kCount / 2, 16>(values);
  add_lanes<kCount / 4, 8>(values);
  add_lanes<kCount / 8, 4>(values);
}

template <class T, class Group>
__global__ void __launch_bounds__(kThreads, 1)
    spectral_dots_sm90_kernel(const __grid_constant__ Group group) {
#if FASTLORA_SM90A
  char* const stages = swizzled_memory();
  WarpDots& found = *reinterpret_cast<WarpDots*>(stages + kStages * kStageBytes);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  if (warp >= kWarps) {
    leave_registers<kCopyingRegisters>();
    copy_dots<T>(group, stages, warp - kWarps);
    return;
  }
  take_registers<kComputingRegisters>();
  Turn turn;
  float sum[kSums];
  int buffer = 0;
  for (Cursor<DotsTiling, Group> at(group, 0); at.inside(group);
       at.advance(group, at.products + kHalves)) {
    for (int32_t step = 0; step < at.products; ++step) {
      wait_until_full(turn.stage);
      char* const stage = stages + turn.stage * kStageBytes;
      const uint64_t grad = matrix_descriptor(stage + warp / 4 * 64 * 128, 16, kSwizzleBytes);
      const uint64_t vh = matrix_descriptor(stage + kLeftBytes, 16, kSwizzleBytes);
      wgmma_fence();
#pragma unroll
      for (int k16 = 0; k16 < kDepth / 16; ++k16)
        wgmma<T, false>(sum, further(grad, k16 * 32), further(vh, k16 * 32), step > 0 || k16 > 0);
      wgmma_commit();
      wgmma_wait<1>();
      turn.leave_last();
      turn.next();
    }
    wgmma_wait<0>();
    keep_in_order(sum);

    const DeviceDots& p = group.layers[at.tile.layer];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      wait_until_full(turn.stage);
      turn.leave_last();
      char* const box = stages + turn.stage * kStageBytes;
      float dots[kHalf / 4];  // of two neighbouring columns in every eight
#pragma unroll
      for (int j = 0; j < kHalf / 8; j += 2) {
        uint32_t u[4];
        load_matrices(u, place_256(box, warp * 16 + lane % 16, j + lane / 16));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* s = sum + (half * kHalf / 8 + j + i) * 4;
          const float2 above = unpack<T>(u[i * 2]), below = unpack<T>(u[i * 2 + 1]);
          dots[(j + i) * 2] = s[0] * above.x + s[2] * below.x;
          dots[(j + i) * 2 + 1] = s[1] * above.y + s[3] * below.y;
        }
      }
      add_up_rows(dots);
      constexpr int kKept = kHalf / 4 / 8;
#pragma unroll
      for (int i = 0; i < kKept; i += 2) {
        const int column = half * kHalf + (lane / 4 * kKept + i) / 2 * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(writable(&found[buffer][warp][column], 2, 8)) =
            make_float2(dots[i], dots[i + 1]);
      }
      turn.next();
    }
    barrier_sync(kTogether, kComputing);
    if (at.tile.column + thread < p.rank) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) total += *readable(&found[buffer][i][thread]);
      *writable(p.partial + int64_t(at.tile.row / kRows) * p.rank + at.tile.column + thread) =
          total;
    }
    buffer ^= 1;  // written again when all have met again
  }
#endif
}

}  // namespace sm90

inline bool takes_spectral_sm90(const DeviceDots& p) {
  return p.in > 0 && !p.u_wide && !p.vh_wide && sm90::grouped(p.grad, p.grad_stride, p.out, p.in) &&
         sm90::grouped(p.u, p.u_stride, p.out, p.rank) &&
         sm90::grouped(p.vh, p.vh_stride, p.rank, p.in);
}

template <class T>
bool has_spectral_dots_sm90() {
  using Few = LayerGroup<DeviceDots, kParameterBytes>;
  return has_warpgroup_products(sm90::spectral_dots_sm90_kernel<T, Few>);
}

template <class T>
void launch_spectral_dots_sm90(const std::vector<DeviceDots>& layers, void* stream) {
  const unsigned most = unsigned(multiprocessors());
  for_each_group<sm90::DotsTiling>(layers, [&](const auto& group, dim3 tiles) {
    const auto kernel = sm90::spectral_dots_sm90_kernel<T, std::decay_t<decltype(group)>>;
    allow_shared_memory(kernel, sm90::kDotsShared);
    launch("spectral_dots_sm90", kernel, dim3(tiles.x < most ? tiles.x : most),
           dim3(sm90::kThreads), sm90::kDotsShared, stream, group);
  });
}

}  // namespace fastlora
