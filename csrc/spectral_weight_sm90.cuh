// W' = W + (U diag(c)) Vᵀ on warpgroups (sm_90a), for 16-bit layers whose rows are aligned. U is
// scaled and rounded in the registers that wgmma reads it from; Vᵀ is multiplied as it lies in
// memory. Included by .cu files only.
#pragma once

#include "spectral_tile_sm90.cuh"
#include "spectral_weight_sm80.cuh"

namespace fastlora::sm90 {

struct WeightTiling : WeightTiles<kRows, kColumns, true> {
  template <class Layer>
  __host__ __device__ static int32_t depth(const Layer& p) {
    return p.rank;
  }
};

constexpr int kWeightShared = kStagesBytes + kStages * kDepth * int(sizeof(float));

// What copying warp `part` does.
template <class T, class Group>
__device__ __forceinline__ void copy_weights(const Group& group, char* stages, float* coefficients,
                                             int part) {
  constexpr int kMyRows = kRows / kParts, kMyDepth = kDepth / kParts;
  const int lane = int(threadIdx.x) % 32;
  copy_all_steps<WeightTiling>(group, [&](const auto& at, int stage, auto wait) {
    const DeviceSpectral& p = group.layers[at.tile.layer];
    char* const to = stages + stage * kStageBytes;
    const int32_t row = at.tile.row + part * kMyRows;
    if (at.step >= at.products) {
      wait();
      copy_rows<T, kMyRows, 16>(to + part * kMyRows * 256,
                                {p.weight, p.weight_stride[0], p.out, p.in}, row,
                                at.tile.column + (at.step - at.products) * kHalf);
      return;
    }
    const int32_t k0 = at.step * kDepth, mine = part * kMyDepth, k = k0 + mine + lane;
    float c = 0.0f;
    if (lane < kMyDepth && k < p.rank)
      c = spectral_coefficient(*readable(p.s + k), *readable(p.strength) * *readable(p.shift + k));
    wait();
    copy_rows<T, kMyRows, 8>(to + part * kMyRows * 128, {p.u, p.u_stride[0], p.out, p.rank}, row,
                             k0);
    // Components with a zero coefficient are zeros, whatever U and V hold.
    copy_mn_major<T, kMyDepth>(to + kLeftBytes + mine / 8 * kRightGroup,
                               {p.vh, p.vh_stride[0], p.rank, p.in}, k0 + mine, at.tile.column,
                               __ballot_sync(0xffffffffu, c != 0.0f));
    if (lane < kMyDepth) *writable(coefficients + stage * kDepth + mine + lane) = c;
  });
}

template <class T, class Group>
__global__ void __launch_bounds__(kThreads, 1)
    spectral_weight_sm90_kernel(const __grid_constant__ Group group) {
#if FASTLORA_SM90A
  char* const stages = swizzled_memory();
  float* const coefficients = reinterpret_cast<float*>(stages + kStages * kStageBytes);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (warp >= kComputing / 32) {
    leave_registers<kCopyingRegisters>();
    copy_weights<T>(group, stages, coefficients, warp - kComputing / 32);
    return;
  }
  take_registers<kComputingRegisters>();
  Turn turn;
  float sum[kSums];
  // U of one step is loaded while the products of the step before are on their way.
  uint32_t even[kDepth / 16][4], odd[kDepth / 16][4];

  // A step's 16 rows of the warp's, times their coefficients.
  auto load_scaled = [&](uint32_t (&to)[kDepth / 16][4]) {
    wait_until_full(turn.stage);
    char* const u = stages + turn.stage * kStageBytes;
    const float* const first = coefficients + turn.stage * kDepth + lane % 4 * 2;
#pragma unroll
    for (int k16 = 0; k16 < kDepth / 16; ++k16) {
      load_matrices(to[k16], place_128(u, warp * 16 + lane % 16, k16 * 2 + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 c =
            *reinterpret_cast<const float2*>(readable(first + k16 * 16 + i / 2 * 8, 2, 8));
        to[k16][i] = scaled<T>(to[k16][i], c);
      }
    }
  };
  // Begins a step's products; those of the step before are there then.
  auto multiply_step = [&](const uint32_t (&a)[kDepth / 16][4], bool add) {
    const uint64_t vh = matrix_descriptor(stages + turn.stage * kStageBytes + kLeftBytes,
                                          kSwizzleBytes, kRightGroup);
    wgmma_fence();
#pragma unroll
    for (int k16 = 0; k16 < kDepth / 16; ++k16)
      wgmma<T, true>(sum, a[k16], further(vh, k16 * 2 * kRightGroup), add || k16 > 0);
    wgmma_commit();
    wgmma_wait<1>();
    turn.leave_last();
    turn.next();
  };

  for (Cursor<WeightTiling, Group> at(group, 0); at.inside(group);
       at.advance(group, at.products + kHalves)) {
    int32_t step = at.products % 2;
    if (step > 0) {
      load_scaled(odd);
      multiply_step(odd, false);
    }
    for (; step < at.products; step += 2) {
      load_scaled(even);
      multiply_step(even, step > 0);
      load_scaled(odd);
      multiply_step(odd, true);
    }
    wgmma_wait<0>();
    keep_in_order(sum);

    const DeviceSpectral& p = group.layers[at.tile.layer];
    // W where a sum's elements are, and W' the same way back; a warp has its own 16 rows.
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      wait_until_full(turn.stage);
      turn.leave_last();
      char* const box = stages + turn.stage * kStageBytes;
#pragma unroll
      for (int j = 0; j < kHalf / 8; j += 2) {
        char* const mine = place_256(box, warp * 16 + lane % 16, j + lane / 16);
        uint32_t w[4];
        load_matrices(w, mine);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* s = sum + (half * kHalf / 8 + j + i / 2) * 4 + i % 2 * 2;
          float2 v = unpack<T>(w[i]);
          if (s[0] != 0.0f) v.x += s[0];  // without a sum even -0 keeps its sign
          if (s[1] != 0.0f) v.y += s[1];
          w[i] = pack<T>(v.x, v.y);
        }
        store_matrices(mine, w);
      }
      __syncwarp();
      const int32_t column = at.tile.column + half * kHalf + lane % 16 * 8;
      const int32_t row = at.tile.row + warp * 16 + lane / 16;
      T* to = static_cast<T*>(p.result) + int64_t(row) * p.result_stride[0] + column;
      const int32_t left = column < p.in ? p.out - row : 0;
#pragma unroll
      for (int i = 0; i < 16; i += 2) {
        Packet<T> packet;
        packet.bits = *reinterpret_cast<const uint4*>(
            readable(place_256(box, warp * 16 + i + lane / 16, lane % 16), 16, 16));
        if (i < left) __stcs(reinterpret_cast<uint4*>(writable(to, 8, 16)), packet.bits);
        to += 2 * int64_t(p.result_stride[0]);
      }
      turn.next();
    }
  }
#endif
}

}  // namespace fastlora::sm90

namespace fastlora {

inline bool takes_spectral_sm90(const DeviceSpectral& p) {
  return p.rank > 0 && !p.u_wide && !p.vh_wide &&
         sm90::grouped(p.weight, p.weight_stride, p.out, p.in) &&
         sm90::grouped(p.result, p.result_stride, p.out, p.in) &&
         sm90::grouped(p.u, p.u_stride, p.out, p.rank) &&
         sm90::grouped(p.vh, p.vh_stride, p.rank, p.in);
}

template <class T>
bool has_spectral_weight_sm90() {
  using Few = LayerGroup<DeviceSpectral, kParameterBytes>;
  return has_warpgroup_products(sm90::spectral_weight_sm90_kernel<T, Few>);
}

template <class T>
void launch_spectral_weights_sm90(const std::vector<DeviceSpectral>& layers, void* stream) {
  const unsigned most = unsigned(multiprocessors());
  for_each_group<sm90::WeightTiling>(layers, [&](const auto& group, dim3 tiles) {
    const auto kernel = sm90::spectral_weight_sm90_kernel<T, std::decay_t<decltype(group)>>;
    allow_shared_memory(kernel, sm90::kWeightShared);
    launch("spectral_weight_sm90", kernel, dim3(tiles.x < most ? tiles.x : most),
           dim3(sm90::kThreads), sm90::kWeightShared, stream, group);
  });
}

}  // namespace fastlora
