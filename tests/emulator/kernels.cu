// Kernels for the tests of the emulator: some right, some with a planted fault. Right ones also run
// on a GPU, which shows that the emulator means what the hardware does.
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"
#include "ptx.cuh"
#include "ptx_sm90.cuh"
#include "types.cuh"

#ifdef FASTLORA_EMULATED
#include "emulator/call.h"
#endif

namespace fastlora {
namespace {

constexpr int kThreads = 128;

// --- right ---------------------------------------------------------------------------------------

template <class T>
__global__ void multiply_kernel(float* sum, const uint32_t* a, const uint32_t* b) {
  const int lane = int(threadIdx.x);
  float s[4];
  uint32_t x[4], y[2];
  for (int i = 0; i < 4; ++i) s[i] = sum[lane * 4 + i], x[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) y[i] = b[lane * 2 + i];
  if constexpr (std::is_same_v<T, float>)
    multiply_tf32(s, x, y);
  else
    multiply<T>(s, x, y);
  for (int i = 0; i < 4; ++i) sum[lane * 4 + i] = s[i];
}

__global__ void tf32_kernel(uint32_t* to, const float* from) {
  to[threadIdx.x] = to_tf32(from[threadIdx.x]);
}

// 16-bit rows of eight; the registers of all lanes.
template <int kCount, bool kTransposed>
__global__ void load_matrices_kernel(uint32_t* to, const uint4* rows) {
  FASTLORA_SHARED(tile, uint4[32]);
  const int lane = int(threadIdx.x);
  tile[lane] = rows[lane];
  __syncthreads();
  uint32_t r[kCount];
  load_matrices<kCount, kTransposed>(r, &tile[lane]);
  for (int i = 0; i < kCount; ++i) to[lane * kCount + i] = r[i];
}

template <int kCount, bool kTransposed>
__global__ void store_matrices_kernel(uint4* rows, const uint32_t* from) {
  FASTLORA_SHARED(tile, uint4[32]);
  const int lane = int(threadIdx.x);
  tile[lane] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  uint32_t r[kCount];
  for (int i = 0; i < kCount; ++i) r[i] = from[lane * kCount + i];
  store_matrices<kCount, kTransposed>(&tile[lane], r);
  __syncthreads();
  rows[lane] = tile[lane];
}

__global__ void sum_kernel(int* to, const int* from) {
  FASTLORA_SHARED(partial, int[kThreads / 32]);
  int v = from[blockIdx.x * kThreads + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) v += __shfl_down_sync(0xffffffffu, v, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / 32; ++i) v += partial[i];
    to[blockIdx.x] = v;
  }
}

__global__ void warp_kernel(int* to, const int* from) {
  const int lane = int(threadIdx.x), v = from[lane];
  constexpr unsigned all = 0xffffffffu;
  int* mine = to + lane * 10;
  mine[0] = __shfl_sync(all, v, lane * 7 + 5);  // every lane asks another one
  mine[1] = __shfl_sync(all, v, 3, 8);
  mine[2] = __shfl_xor_sync(all, v, 9);
  mine[3] = __shfl_up_sync(all, v, 3);
  mine[4] = __shfl_down_sync(all, v, 3, 16);
  mine[5] = int(__ballot_sync(all, v % 2 == 0));
  mine[6] = __any_sync(all, v == 1000);
  mine[7] = __all_sync(all, v < 1000);
  if (lane < 16)  // two halves that go their own ways
    mine[8] = __shfl_xor_sync(0x0000ffffu, v, 1);
  else
    mine[8] = __shfl_xor_sync(0xffff0000u, v, 2);
  __syncwarp();
  mine[9] = atomicAdd(to + 32 * 10, v) >= 0;
}

// Two stages of asynchronous copies; neighbours read what a thread has copied.
template <bool kWait, bool kBarrierAfter, bool kBarrierBefore>
__global__ void pipeline_kernel(float* to, const float* from, int stages) {
  FASTLORA_SHARED(tile, float[2][kThreads * 4]);
  const int thread = int(threadIdx.x);
  auto issue = [&](int stage) {
    if (stage < stages)
      copy_async<16>(&tile[stage % 2][thread * 4], from + (stage * kThreads + thread) * 4);
    commit_copies();
  };
  issue(0);
  float sum = 0;
  for (int stage = 0; stage < stages; ++stage) {
    issue(stage + 1);
    if (kWait) wait_copies<1>();
    if (kBarrierAfter) __syncthreads();
    for (int i = 0; i < 4; ++i) sum += tile[stage % 2][(thread * 4 + 5 * i) % (kThreads * 4)];
    if (kBarrierBefore) __syncthreads();
  }
  wait_copies<0>();
  to[thread] = sum;
}

// The first half of the block writes, the second reads.
__global__ void named_barrier_kernel(int* to, const int* from, int rounds) {
  FASTLORA_SHARED(box, int[64]);
  const int thread = int(threadIdx.x);
  for (int round = 0; round < rounds; ++round) {
    if (thread < 64) {
      if (round > 0) barrier_sync(2, kThreads);  // the box is empty
      box[thread] = from[round * 64 + thread];
      barrier_arrive(1, kThreads);  // and full
    } else {
      barrier_sync(1, kThreads);
      to[round * 64 + thread - 64] = box[127 - thread];
      if (round + 1 < rounds) barrier_arrive(2, kThreads);
    }
  }
}

__global__ void reverse_kernel(int* to, const int* from) {
  auto* box = static_cast<int*>(dynamic_shared());
  box[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  to[threadIdx.x] = box[blockDim.x - 1 - threadIdx.x];
}

__global__ void histogram_kernel(int* counts, const int* from, int n) {
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x))
    atomicAdd(&counts[from[i]], 1);
}

__global__ void square_kernel(float* to, const float* from) {
  let_next_kernel_start();
  to[threadIdx.x] = from[threadIdx.x] * from[threadIdx.x];
}
enum class Wait { kInTime, kTooLate, kNever };
template <Wait kWait>
__global__ void negate_kernel(float* to, const float* from) {
  if (kWait == Wait::kInTime) wait_for_previous_kernel();
  const float v = from[threadIdx.x];
  if (kWait == Wait::kTooLate) wait_for_previous_kernel();
  to[threadIdx.x] = -v;
}

// Warps that are not full, and lanes that leave early: only the others take part.
__global__ void partial_warp_kernel(int* to) {
  if (threadIdx.x == 5) return;
  __syncwarp();
  to[threadIdx.x] = int(__ballot_sync(0xffffffffu, 1));
}

// C = A Bᵀ, 16x8 by depth `k`, through swizzled shared memory: the path of a real kernel in small.
template <int kSwizzle>
__global__ void swizzled_kernel(float* c, const __nv_bfloat16* a, const __nv_bfloat16* b) {
  constexpr int kDepth = 64;
  FASTLORA_SHARED(tile, __nv_bfloat16[24][kDepth]);  // sixteen rows of A, eight of B
  const int lane = int(threadIdx.x);
  auto place = [&](int row, int group, int swizzle) {
    return &tile[row][(group ^ (row % swizzle)) * 8];
  };
  for (int i = lane; i < 24 * 8; i += 32) {
    const int row = i / 8, group = i % 8;
    const __nv_bfloat16* from = row < 16 ? a + row * kDepth : b + (row - 16) * kDepth;
    copy_async<16>(place(row, group, 8), from + group * 8);
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  float sum[4] = {};
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t x[4], y[2];
    load_matrices(x, place(lane % 16, k / 8 + lane / 16, kSwizzle));
    load_matrices(y, place(16 + lane % 8, k / 8 + lane / 8 % 2, kSwizzle));
    multiply<__nv_bfloat16>(sum, x, y);
  }
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

__global__ void halves_kernel(float* to, const __half* from, __half* back) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  to[i] = widen(from[i]);
  narrow(to[i], back + i);
}

template <class T>
__global__ void narrow_kernel(T* to, const float* from) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  narrow(from[i], to + i);
}

// C = A B, 64 x 64 by 64 x kColumns, by one warpgroup: A in registers or in shared memory, B
// [k, columns] as it lies in memory (MN-major) or its transpose (k-major). Two stages of 64 k each,
// the second one written over the first.
enum class Fault {
  kNone,
  kProxy,
  kEarlyProxy,
  kRegisters,
  kReads,
  kOverwrites,
  kNoBarrier,
  kReuse
};

template <class T, int kColumns, bool kInRegisters, bool kMnMajor, Fault kFault = Fault::kNone>
__global__ void wgmma_kernel(float* c, const T* a, const T* b, int stages) {
#if FASTLORA_SM90A
  constexpr int kBytes = 64 * (64 + kColumns) * 2;
  FASTLORA_SHARED(memory, char[kBytes + kSwizzleBytes]);
  char* const base = memory + (kSwizzleBytes - reinterpret_cast<uintptr_t>(memory) % kSwizzleBytes);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  auto place = [&](char* matrix, int row, int group) {
    return matrix + row * 128 + ((group ^ (row & 7)) << 4);
  };
  char* const second = base + 64 * 128;
  float sum[kColumns / 2];
  uint32_t x[4][4];
  if (kFault != Fault::kReads)
    for (float& v : sum) v = 1.0f;
  for (int stage = 0; stage < stages; ++stage) {
    for (int i = thread; i < 64 * 8; i += kThreads)
      copy_async<16>(place(base, i / 8, i % 8), a + stage * 64 * 64 + i * 8);
    const T* from = b + stage * 64 * kColumns;
    for (int i = thread; i < 8 * kColumns; i += kThreads) {
      const int row = kMnMajor ? i / (kColumns / 8) : i / 8;
      const int group = kMnMajor ? i % (kColumns / 8) : i % 8;
      char* to =
          kMnMajor ? place(second + group / 8 * 8192, row, group % 8) : place(second, row, group);
      copy_async<16>(to, from + i * 8);
    }
    commit_copies();
    if (kFault == Fault::kEarlyProxy) fence_proxy_async();
    wait_copies<0>();
    if (kFault != Fault::kProxy && kFault != Fault::kEarlyProxy) fence_proxy_async();
    if (kFault != Fault::kNoBarrier) __syncthreads();
    for (int k16 = 0; k16 < 4; ++k16)
      load_matrices(x[k16], place(base, warp * 16 + lane % 16, k16 * 2 + lane / 16));
    if (kFault != Fault::kRegisters) wgmma_fence();
    for (int k16 = 0; k16 < 4; ++k16) {
      const uint64_t right = kMnMajor ? matrix_descriptor(second + k16 * 2048, 8192, 1024)
                                      : matrix_descriptor(second + k16 * 32, 16, 1024);
      const bool add = stage > 0 || k16 > 0;
      if constexpr (kInRegisters)
        wgmma<T, kMnMajor>(sum, x[k16], right, add);
      else
        wgmma<T, kMnMajor>(sum, matrix_descriptor(base + k16 * 32, 16, 1024), right, add);
      if (kFault == Fault::kReuse && k16 == 0) load_matrices(x[0], place(base, lane % 16, 0));
    }
    wgmma_commit();
    if (kFault != Fault::kOverwrites) wgmma_wait<0>();
    if (kFault == Fault::kReads) wgmma_commit();
    __syncthreads();
  }
  if (kFault == Fault::kReads) {  // one that nobody has waited for yet
    wgmma_fence();
    wgmma<T, kMnMajor>(sum, x[0], matrix_descriptor(second, 8192, 1024), true);
    wgmma_commit();
  }
  auto store_all = [&] {
    for (int i = 0; i < kColumns / 2; ++i)
      c[(warp * 16 + i / 2 % 2 * 8 + lane / 4) * kColumns + i / 4 * 8 + lane % 4 * 2 + i % 2] =
          sum[i];
  };
  if (kFault == Fault::kReads) store_all();
  wgmma_wait<0>();
  if (kFault != Fault::kReads) store_all();
#endif
}

// --- with a fault --------------------------------------------------------------------------------

__global__ void no_barrier_kernel(int* to, const int* from) {
  FASTLORA_SHARED(box, int[kThreads]);
  box[threadIdx.x] = from[threadIdx.x];
  to[threadIdx.x] = box[kThreads - 1 - threadIdx.x];
}

__global__ void race_kernel(int* to, const int* from) { to[threadIdx.x / 2] = from[threadIdx.x]; }

__global__ void race_of_blocks_kernel(int* to) {
  if (threadIdx.x == 0) to[0] = int(blockIdx.x);
}

__global__ void unwritten_kernel(int* to, const int* from) {
  if (threadIdx.x != 77) to[threadIdx.x] = from[threadIdx.x];
}

__global__ void unwritten_shared_kernel(int* to) {
  FASTLORA_SHARED(box, int[kThreads]);
  to[threadIdx.x] = box[threadIdx.x];
}

__global__ void beyond_kernel(int* to, const int* from) {
  to[threadIdx.x] = from[threadIdx.x];
  if (threadIdx.x == 5) to[kThreads] = 1;
}

__global__ void reads_beyond_kernel(int* to, const int* from) {
  to[threadIdx.x] = from[threadIdx.x + 1];
}

__global__ void stores_beyond_kernel(float* to, const float* from, int n) {
  float v[kWidth];
  const int at = int(threadIdx.x) * kWidth;
  load(from + at, true, kWidth, v);
  store(to + at, true, kWidth, v);
  if (at + kWidth == n) store(to + n, false, 3, v);
}

__global__ void misaligned_kernel(float* to, const float* from) {
  float v[kWidth];
  load(from + 1, true, kWidth, v);
  store(to, true, kWidth, v);
}

__global__ void beyond_shared_kernel(int* to) {
  FASTLORA_SHARED(box, int[8]);
  int* first = box;
  first[threadIdx.x % 8] = 0;
  first[blockDim.x - 24] = 1;  // one too far
  to[threadIdx.x] = box[threadIdx.x % 8];
}

__global__ void writes_input_kernel(int* to, const int* from) {
  to[threadIdx.x] = from[threadIdx.x];
  if (threadIdx.x == 3) const_cast<int*>(from)[3] = 9;
}

__global__ void never_waits_kernel(float* to, const float* from) {
  FASTLORA_SHARED(tile, float[4]);
  if (threadIdx.x == 0) copy_async<16>(tile, from);
  to[threadIdx.x] = 0;
}

__global__ void half_a_barrier_kernel(int* to) {
  if (threadIdx.x < 64) __syncthreads();
  to[threadIdx.x] = 0;
}

__global__ void two_barriers_kernel(int* to) {
  if (threadIdx.x < 64)
    __syncthreads();
  else
    __syncthreads();
  to[threadIdx.x] = 0;
}

__global__ void lonely_shuffle_kernel(int* to) {
  if (threadIdx.x == 7) return;
  to[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void two_shuffles_kernel(int* to) {
  int v = 0;
  if (threadIdx.x % 2)
    v = __shfl_xor_sync(0xffffffffu, 1, 1);
  else
    v = int(__ballot_sync(0xffffffffu, 1));
  to[threadIdx.x] = v;
}

__global__ void lost_update_kernel(int* count) { *writable(count) = *readable(count) + 1; }

__global__ void unwritten_flag_kernel(int* to, int* flag) { to[threadIdx.x] = flag[0] ? 1 : 2; }

__global__ void unwritten_minimum_kernel(float* to, float* least, const float* from) {
  to[threadIdx.x] = fminf(least[threadIdx.x], from[threadIdx.x]);
}

__global__ void greedy_kernel(int* to) { to[threadIdx.x] = 0; }

__global__ void nearly_greedy_kernel(int* to) {
  FASTLORA_SHARED(tile, int[32]);
  tile[threadIdx.x] = 0;
  to[threadIdx.x] = tile[threadIdx.x];
}

__global__ void matrix_in_global_kernel(uint32_t* to, const uint4* rows) {
  uint32_t r[1];
  load_matrices<1>(r, &rows[threadIdx.x]);
  to[threadIdx.x] = r[0];
}

__global__ void two_types_kernel(int* to) {
  if (threadIdx.x % 2)
    to[threadIdx.x] = int(__shfl_xor_sync(0xffffffffu, 1.5, 1));
  else
    to[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 7, 1);
}

__global__ void half_a_warp_kernel(int* to) {
  if (threadIdx.x % 32 < 16) barrier_sync(1, 64);
  to[threadIdx.x] = 0;
}

__global__ void long_copy_kernel(float* to, const float* from) {
  FASTLORA_SHARED(tile, float[8]);
  if (threadIdx.x == 0) copy_async<16>(tile, from, 20);
  commit_copies();
  wait_copies<0>();
  to[threadIdx.x] = 0;
}

__global__ void crowded_barrier_kernel(int* to) {
  barrier_sync(1, threadIdx.x < 32 ? 64 : 96);
  to[threadIdx.x] = 0;
}

// What only some warps of a warpgroup do.
__global__ void lonely_wgmma_kernel(float* to) {
#if FASTLORA_SM90A
  FASTLORA_SHARED(memory, char[64 * 256]);
  for (int i = int(threadIdx.x); i < 64 * 16; i += int(blockDim.x))
    *reinterpret_cast<uint4*>(writable(memory + i * 16, 16, 16)) = make_uint4(0, 0, 0, 0);
  fence_proxy_async();
  __syncthreads();
  float sum[64] = {};
  const uint32_t a[4] = {};
  wgmma_fence();
  if (threadIdx.x < 96) wgmma<__half, true>(sum, a, matrix_descriptor(memory, 8192, 1024), false);
  wgmma_commit();
  wgmma_wait<0>();
  to[threadIdx.x] = sum[0];
#endif
}

__global__ void never_waits_for_wgmma_kernel(float* to) {
#if FASTLORA_SM90A
  FASTLORA_SHARED(memory, char[64 * 256]);
  for (int i = int(threadIdx.x); i < 64 * 16; i += int(blockDim.x))
    *reinterpret_cast<uint4*>(writable(memory + i * 16, 16, 16)) = make_uint4(0, 0, 0, 0);
  fence_proxy_async();
  __syncthreads();
  float sum[64] = {};
  const uint32_t a[4] = {};
  wgmma_fence();
  wgmma<__half, true>(sum, a, matrix_descriptor(memory, 8192, 1024), false);
  wgmma_commit();
  to[threadIdx.x] = 0;
#endif
}

// --- by name -------------------------------------------------------------------------------------

struct Case {
  const std::string name;
  const std::vector<void*>& data;
  const std::vector<int64_t>& sizes;
  void* stream;

  template <class T>
  T* at(size_t i) const {
    return static_cast<T*>(data.at(i));
  }
  template <class... P, class... A>
  bool run(const char* wanted, void (*kernel)(P...), int blocks, int threads,
           A... arguments) const {
    if (name != wanted) return false;
    launch(wanted, kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), 0, stream,
           arguments...);
    return true;
  }
};

bool matrices(const Case& c) {
  auto* u = c.at<uint32_t>(0);
  auto* q = static_cast<uint4*>(c.data.at(0));
  const auto* rows = c.at<const uint4>(1);
  const auto* registers = c.at<const uint32_t>(1);
  return c.run("load_1", load_matrices_kernel<1, false>, 1, 32, u, rows) ||
         c.run("load_2", load_matrices_kernel<2, false>, 1, 32, u, rows) ||
         c.run("load_4", load_matrices_kernel<4, false>, 1, 32, u, rows) ||
         c.run("load_1t", load_matrices_kernel<1, true>, 1, 32, u, rows) ||
         c.run("load_2t", load_matrices_kernel<2, true>, 1, 32, u, rows) ||
         c.run("load_4t", load_matrices_kernel<4, true>, 1, 32, u, rows) ||
         c.run("store_1", store_matrices_kernel<1, false>, 1, 32, q, registers) ||
         c.run("store_2", store_matrices_kernel<2, false>, 1, 32, q, registers) ||
         c.run("store_4", store_matrices_kernel<4, false>, 1, 32, q, registers) ||
         c.run("store_1t", store_matrices_kernel<1, true>, 1, 32, q, registers) ||
         c.run("store_2t", store_matrices_kernel<2, true>, 1, 32, q, registers) ||
         c.run("store_4t", store_matrices_kernel<4, true>, 1, 32, q, registers);
}

template <Fault kFault>
bool faulty_product(const Case& c, const char* name) {
  return c.run(name, wgmma_kernel<__nv_bfloat16, 128, true, true, kFault>, 1, kThreads,
               c.at<float>(0), c.at<const __nv_bfloat16>(1), c.at<const __nv_bfloat16>(2),
               int(c.sizes[1] / 4096));
}

template <class T, int kColumns>
bool product(const Case& c, const std::string& name) {
  const auto *a = c.at<const T>(1), *b = c.at<const T>(2);
  const int stages = int(c.sizes[1] / 4096);
  const auto run = [&](const char* form, auto kernel) {
    return c.run((name + form).c_str(), kernel, 1, kThreads, c.at<float>(0), a, b, stages);
  };
  return run("_registers_mn", wgmma_kernel<T, kColumns, true, true>) ||
         run("_registers_k", wgmma_kernel<T, kColumns, true, false>) ||
         run("_memory_mn", wgmma_kernel<T, kColumns, false, true>) ||
         run("_memory_k", wgmma_kernel<T, kColumns, false, false>);
}

bool products(const Case& c) {
  return product<__half, 128>(c, "wgmma_half_128") || product<__half, 256>(c, "wgmma_half_256") ||
         product<__nv_bfloat16, 128>(c, "wgmma_bfloat16_128") ||
         product<__nv_bfloat16, 256>(c, "wgmma_bfloat16_256") ||
         faulty_product<Fault::kProxy>(c, "no_proxy_fence") ||
         faulty_product<Fault::kEarlyProxy>(c, "early_proxy_fence") ||
         faulty_product<Fault::kRegisters>(c, "no_register_fence") ||
         faulty_product<Fault::kReads>(c, "reads_accumulators") ||
         faulty_product<Fault::kOverwrites>(c, "overwrites_operands") ||
         faulty_product<Fault::kReuse>(c, "reuses_registers") ||
         faulty_product<Fault::kNoBarrier>(c, "no_barrier_before_wgmma");
}

bool dependent(const Case& c, Wait wait) {
  auto *middle = c.at<float>(1), *to = c.at<float>(0);
  launch("square", square_kernel, dim3(1), dim3(kThreads), 0, c.stream, middle,
         c.at<const float>(2));
  const auto kernel = wait == Wait::kInTime    ? negate_kernel<Wait::kInTime>
                      : wait == Wait::kTooLate ? negate_kernel<Wait::kTooLate>
                                               : negate_kernel<Wait::kNever>;
  launch_dependent("negate", kernel, dim3(1), dim3(kThreads), 0, c.stream, to,
                   static_cast<const float*>(middle));
  return true;
}

void run_case(const Case& c) {
  const int n = int(c.sizes.at(0));
  auto* i0 = c.at<int>(0);
  auto* f0 = c.at<float>(0);
  const auto* i1 = c.data.size() > 1 ? c.at<const int>(1) : nullptr;
  const auto* f1 = c.data.size() > 1 ? c.at<const float>(1) : nullptr;
  const int stages = c.data.size() > 1 ? int(c.sizes[1] / (kThreads * 4)) : 0;
  bool found = false;
  if (c.data.size() > 2) {
    const auto *a = c.at<const uint32_t>(1), *b = c.at<const uint32_t>(2);
    const auto *h = c.at<const __nv_bfloat16>(1), *g = c.at<const __nv_bfloat16>(2);
    found =
        products(c) || c.run("multiply_half", multiply_kernel<__half>, 1, 32, f0, a, b) ||
        c.run("multiply_bfloat16", multiply_kernel<__nv_bfloat16>, 1, 32, f0, a, b) ||
        c.run("multiply_tf32", multiply_kernel<float>, 1, 32, f0, a, b) ||
        c.run("swizzled", swizzled_kernel<8>, 1, 32, f0, h, g) ||
        c.run("wrong_swizzle", swizzled_kernel<4>, 1, 32, f0, h, g) ||
        c.run("halves", halves_kernel, n / 256, 256, f0, c.at<const __half>(1), c.at<__half>(2)) ||
        (c.name == "dependent" && dependent(c, Wait::kInTime)) ||
        (c.name == "waits_too_late" && dependent(c, Wait::kTooLate)) ||
        (c.name == "does_not_wait" && dependent(c, Wait::kNever)) ||
        c.run("unwritten_minimum", unwritten_minimum_kernel, 1, kThreads, f0, c.at<float>(1),
              c.at<const float>(2));
  }
  if (c.name == "greedy") {
    launch("greedy", greedy_kernel, dim3(1), dim3(32), 60 << 10, c.stream, i0);
    found = true;
  }
  if (c.name == "nearly_greedy") {
    launch("nearly_greedy", nearly_greedy_kernel, dim3(1), dim3(32), 48 << 10, c.stream, i0);
    found = true;
  }
  if (c.name == "reverse") {
    launch("reverse", reverse_kernel, dim3(1), dim3(unsigned(n)), size_t(n) * sizeof(int), c.stream,
           i0, i1);
    found = true;
  }
  found =
      found || (c.data.size() == 2 && matrices(c)) ||
      c.run("tf32", tf32_kernel, 1, n, c.at<uint32_t>(0), f1) ||
      c.run("sum", sum_kernel, n, kThreads, i0, i1) || c.run("warp", warp_kernel, 1, 32, i0, i1) ||
      c.run("pipeline", pipeline_kernel<true, true, true>, 1, kThreads, f0, f1, stages) ||
      c.run("named_barrier", named_barrier_kernel, 1, kThreads, i0, i1, n / 64) ||
      c.run("histogram", histogram_kernel, 3, 96, i0, i1, stages ? int(c.sizes[1]) : 0) ||
      c.run("narrow_half", narrow_kernel<__half>, n / 256, 256, c.at<__half>(0), f1) ||
      c.run("narrow_bfloat16", narrow_kernel<__nv_bfloat16>, n / 256, 256, c.at<__nv_bfloat16>(0),
            f1) ||
      c.run("no_barrier", no_barrier_kernel, 1, kThreads, i0, i1) ||
      c.run("race", race_kernel, 1, kThreads, i0, i1) ||
      c.run("race_of_blocks", race_of_blocks_kernel, 4, 32, i0) ||
      c.run("unwritten", unwritten_kernel, 1, kThreads, i0, i1) ||
      c.run("unwritten_shared", unwritten_shared_kernel, 1, kThreads, i0) ||
      c.run("beyond", beyond_kernel, 1, kThreads, i0, i1) ||
      c.run("reads_beyond", reads_beyond_kernel, 1, kThreads, i0, i1) ||
      c.run("stores_beyond", stores_beyond_kernel, 1, n / kWidth, f0, f1, n) ||
      c.run("misaligned", misaligned_kernel, 1, 1, f0, f1) ||
      c.run("beyond_shared", beyond_shared_kernel, 1, 32, i0) ||
      c.run("writes_input", writes_input_kernel, 1, kThreads, i0, i1) ||
      c.run("looks_too_early", pipeline_kernel<false, true, true>, 1, kThreads, f0, f1, stages) ||
      c.run("no_barrier_after_wait", pipeline_kernel<true, false, true>, 1, kThreads, f0, f1,
            stages) ||
      c.run("copies_over_readers", pipeline_kernel<true, true, false>, 1, kThreads, f0, f1,
            stages) ||
      c.run("never_waits", never_waits_kernel, 1, 32, f0, f1) ||
      c.run("half_a_barrier", half_a_barrier_kernel, 1, kThreads, i0) ||
      c.run("two_barriers", two_barriers_kernel, 1, kThreads, i0) ||
      c.run("lonely_shuffle", lonely_shuffle_kernel, 1, 32, i0) ||
      c.run("two_shuffles", two_shuffles_kernel, 1, 32, i0) ||
      c.run("partial_warp", partial_warp_kernel, 1, n, i0) ||
      c.run("lost_update", lost_update_kernel, 1, kThreads, i0) ||
      c.run("unwritten_flag", unwritten_flag_kernel, 1, kThreads, i0, const_cast<int*>(i1)) ||
      c.run("matrix_in_global", matrix_in_global_kernel, 1, 32, c.at<uint32_t>(0),
            reinterpret_cast<const uint4*>(i1)) ||
      c.run("two_types", two_types_kernel, 1, 32, i0) ||
      c.run("half_a_warp", half_a_warp_kernel, 1, kThreads, i0) ||
      c.run("long_copy", long_copy_kernel, 1, 32, f0, f1) ||
      c.run("lonely_wgmma", lonely_wgmma_kernel, 1, kThreads, f0) ||
      c.run("never_waits_for_wgmma", never_waits_for_wgmma_kernel, 1, kThreads, f0) ||
      c.run("crowded_barrier", crowded_barrier_kernel, 1, kThreads, i0);
  if (!found) throw std::invalid_argument("no kernel is called " + c.name);
}

}  // namespace
}  // namespace fastlora

// Runs a case on arrays in the CPU's memory; null, or what went wrong. Roles: 0 in, 1 out, 2 both,
// 3 scratch. `runs` and `seed` are for the emulator.
extern "C" __attribute__((visibility("default"))) const char* run_kernel(
    const char* name, void** arrays, const int64_t* elements, const int32_t* bytes,
    const int32_t* roles, int count, int runs, uint64_t seed) {
  using namespace fastlora;
  static thread_local std::string error;
  try {
    std::vector<int64_t> sizes(elements, elements + count);
    std::vector<void*> data(arrays, arrays + count);
#ifdef FASTLORA_EMULATED
    emulator::Call call(name, runs, seed);
    std::vector<TensorView> views(static_cast<size_t>(count));
    const int64_t one = 1;
    for (size_t i = 0; i < views.size(); ++i) {
      TensorView& v = views[i];
      v.data = arrays[i];
      v.shape = &sizes[i];
      v.strides = &one;
      v.ndim = 1;
      v.dtype = bytes[i] == 2 ? DType::kFloat16 : bytes[i] == 8 ? DType::kFloat64 : DType::kFloat32;
      v.defined = true;
      call.add("array " + std::to_string(i), v, static_cast<emulator::Role>(roles[i]));
    }
    call.run([&] {
      for (size_t i = 0; i < views.size(); ++i) data[i] = views[i].data;
      run_case({name, data, sizes, nullptr});
    });
#else
    (void)roles, (void)runs, (void)seed;
    for (size_t i = 0; i < data.size(); ++i) {
      const size_t size = size_t(elements[i]) * size_t(bytes[i]);
      check_cuda(cudaMalloc(&data[i], size), "cudaMalloc");
      check_cuda(cudaMemcpy(data[i], arrays[i], size, cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    run_case({name, data, sizes, nullptr});
    check_cuda(cudaDeviceSynchronize(), name);
    for (size_t i = 0; i < data.size(); ++i) {
      const size_t size = size_t(elements[i]) * size_t(bytes[i]);
      check_cuda(cudaMemcpy(arrays[i], data[i], size, cudaMemcpyDeviceToHost), "cudaMemcpy");
      check_cuda(cudaFree(data[i]), "cudaFree");
    }
#endif
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
