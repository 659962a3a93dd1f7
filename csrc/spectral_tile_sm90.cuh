// What the kernels on warpgroups (sm_90a) have in common. Included by .cu files only.
//
// A block stays for several tiles of 128 x 256. A step is one full stage of shared memory: 64 k of
// both operands, or half of the matrix that the epilogue needs. Four warps copy, a quarter of each
// step, ahead into the next tile too; two warpgroups compute, each 64 rows of the
// tile. They meet at named barriers: a stage is full for a warpgroup, or empty for the warp that
// fills it.
#pragma once

#include "layer_group.cuh"
#include "ptx_sm90.cuh"
#include "types.cuh"

namespace fastlora::sm90 {

constexpr int kRows = 128, kColumns = 256, kDepth = 64;
constexpr int kComputing = 256, kCopying = 128, kThreads = kComputing + kCopying;
constexpr int kStages = 4, kParts = kCopying / 32;  // of a stage, each copied by one warp
constexpr int kSums = kColumns / 2;                 // of a thread
constexpr int kLeftBytes = kRows * 128, kRightBytes = kColumns * 128;
constexpr int kRightGroup = kColumns / 64 * kSwizzleBytes;  // MN-major: eight k of all columns
constexpr int kStageBytes = kLeftBytes + kRightBytes;
constexpr int kHalf = kColumns / 2, kHalves = 2;  // columns of a step of the epilogue
constexpr int kStagesBytes = kSwizzleBytes + kStages * kStageBytes;
// 65536 registers: what the compiler gives all threads, and what they make of it.
constexpr int kCopyingRegisters = 72, kComputingRegisters = 216;
static_assert(kRows * kHalf * 2 <= kStageBytes, "a step of the epilogue is a stage");

// --- stages --------------------------------------------------------------------------------------

constexpr int kTogether = 13;  // a barrier for all that compute

// The copying warps wait until both warpgroups have left it.
__device__ __forceinline__ void wait_until_empty(int stage) {
  barrier_sync(9 + stage, kComputing + kCopying);
}
__device__ __forceinline__ void leave(int stage) {
  barrier_arrive(9 + stage, kComputing + kCopying);
}
// What the calling warp has copied into a stage, kLater groups of copies ago, can be read, by wgmma
// too.
template <int kLater>
__device__ __forceinline__ void hand_over(int stage) {
  wait_copies<kLater>();
  fence_proxy_async();
  barrier_arrive(1 + stage * 2, 128 + kCopying);
  barrier_arrive(2 + stage * 2, 128 + kCopying);
}
__device__ __forceinline__ void wait_until_full(int stage) {
  barrier_sync(1 + stage * 2 + int(threadIdx.x) / 128, 128 + kCopying);
}

// Where a warpgroup is: it leaves a stage one step later, when nothing on its way reads it.
struct Turn {
  int stage = 0;

  // All stages but the last are empty; that one is left with the first step.
  __device__ Turn() {
#pragma unroll
    for (int i = 0; i + 1 < kStages; ++i) leave(i);
  }
  __device__ __forceinline__ void leave_last() const { leave((stage + kStages - 1) % kStages); }
  __device__ __forceinline__ void next() { stage = (stage + 1) % kStages; }
};

// Dynamic shared memory from where swizzled matrices may begin.
__device__ __forceinline__ char* swizzled_memory() {
  char* const memory = static_cast<char*>(dynamic_shared());
#ifdef FASTLORA_EMULATED
  const uint32_t begin = emulator::block().shared_address(memory, Here::current());
#else
  const uint32_t begin = shared_address(memory);
#endif
  return memory + (kSwizzleBytes - begin % kSwizzleBytes) % kSwizzleBytes;
}

// --- steps ---------------------------------------------------------------------------------------

// Which tile, which step of it; Tiling::depth is what a layer sums over.
template <class Tiling, class Group>
struct Cursor {
  int32_t block;
  Tile tile;
  int32_t step, products;  // of all steps these come first, then the epilogue's

  __device__ __forceinline__ Cursor(const Group& group, int32_t first_step) {
    enter(group, int32_t(blockIdx.x));
    step = 0;
    advance(group, first_step);
  }
  __device__ __forceinline__ bool inside(const Group& group) const {
    return block < group.first_tile[group.count];
  }
  __device__ __forceinline__ void advance(const Group& group, int32_t by) {
    for (step += by; inside(group) && step >= products + kHalves;) {
      step -= products + kHalves;
      enter(group, block + int32_t(gridDim.x));
    }
  }

 private:
  __device__ __forceinline__ void enter(const Group& group, int32_t number) {
    block = number;
    if (!inside(group)) return;
    tile = tile_of<Tiling>(group, block);
    products = (Tiling::depth(group.layers[tile.layer]) + kDepth - 1) / kDepth;
  }
};

// What a copying warp does: `copy(cursor, stage, wait)` begins its part of a step's copies after it
// has called wait(); a stage is handed over while the next one's are on their way.
template <class Tiling, class Group, class Copy>
__device__ __forceinline__ void copy_all_steps(const Group& group, const Copy& copy) {
  int stage = 0;
  bool pending = false;
  for (Cursor<Tiling, Group> at(group, 0); at.inside(group); at.advance(group, 1)) {
    copy(at, stage, [stage] { wait_until_empty(stage); });
    commit_copies();
    if (pending) hand_over<1>((stage + kStages - 1) % kStages);
    pending = true;
    stage = (stage + 1) % kStages;
  }
  if (pending) hand_over<0>((stage + kStages - 1) % kStages);
}

// --- copies, each by one warp --------------------------------------------------------------------

// A matrix in memory: rows are aligned to 16 bytes and have whole groups of eight elements.
struct Source {
  const void* data;
  int32_t stride, rows, columns;
};

// Group `group` of eight 16-bit elements in row `row`, of rows of 128 bytes and of 256.
__device__ __forceinline__ char* place_128(char* matrix, int row, int group) {
  return matrix + row * 128 + ((group ^ (row & 7)) << 4);
}
__device__ __forceinline__ char* place_256(char* matrix, int row, int group) {
  return matrix + row * 256 + ((group ^ (row & 7)) << 4);
}

// kCount rows of kGroups groups (8 or 16) from (row, column) on, zeros beyond the edges.
template <class T, int kCount, int kGroups>
__device__ __forceinline__ void copy_rows(char* to, const Source& p, int32_t row, int32_t column) {
  constexpr int kAtOnce = 32 / kGroups, kTurns = 8 / kAtOnce;  // until the permutation repeats
  const int lane = int(threadIdx.x) % 32, group = lane % kGroups, first = lane / kGroups;
  const int32_t bytes = kAtOnce * p.stride * 2;
  const T* from =
      static_cast<const T*>(p.data) + int64_t(row + first) * p.stride + column + group * 8;
  char* places[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i)
    places[i] = (kGroups == 8 ? place_128 : place_256)(to, first + i * kAtOnce, group);
  auto place = [&](int i) { return places[i % kTurns] + i / kTurns * kTurns * 512; };
  if (row + kCount <= p.rows && column + kGroups * 8 <= p.columns) {
#pragma unroll
    for (int i = 0; i < kCount / kAtOnce; ++i)
      copy_async<16>(place(i), strides_after(from, bytes, i));
    return;
  }
  const int32_t left = column + group * 8 < p.columns ? p.rows - row - first : 0;
#pragma unroll 1
  for (int i = 0; i < kCount / kAtOnce; i += kTurns)
#pragma unroll
    for (int j = 0; j < kTurns; ++j)
      copy_async<16>(places[j] + i * 512, strides_after(from, bytes, i + j),
                     (i + j) * kAtOnce < left ? 16 : 0);
}

// kCount rows of kColumns elements from (row, column) on as an MN-major operand; of those rows
// whose bit in `on` is set, zeros for the others.
template <class T, int kCount>
__device__ __forceinline__ void copy_mn_major(char* to, const Source& p, int32_t row,
                                              int32_t column, unsigned on) {
  const int lane = int(threadIdx.x) % 32;
  const int32_t bytes = p.stride * 2;
  const T* from = static_cast<const T*>(p.data) + int64_t(row) * p.stride + column + lane * 8;
  char* places[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) places[i] = place_128(to + lane / 8 * kSwizzleBytes, i, lane % 8);
  constexpr unsigned kAll = (1u << kCount) - 1;
  if (column + kColumns <= p.columns && (on & kAll) == kAll) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      copy_async<16>(places[i % 8] + i / 8 * kRightGroup, strides_after(from, bytes, i));
    return;
  }
  if (column + lane * 8 >= p.columns) on = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    copy_async<16>(places[i % 8] + i / 8 * kRightGroup, strides_after(from, bytes, i),
                   on >> i & 1 ? 16 : 0);
}

// Whether a matrix can be a Source.
inline bool grouped(const void* data, const int32_t (&stride)[2], int32_t rows, int32_t columns) {
  return aligned16(data) && columns % 8 == 0 && stride[1] == 1 && (rows <= 1 || stride[0] % 8 == 0);
}

}  // namespace fastlora::sm90
