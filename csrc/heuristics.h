// Which form of the low-rank linear layer a device computes fastest: a model of its time, not a
// measurement; `fastlora.tune` measures. Numbers of compute capability 9.0, and kLaunch and kStep,
// were measured on an H100 (bf16, CUDA graphs: bench/bench_gemm.py, bench_lora_linear.py), those of
// a CPU too; those of other GPUs are datasheets' or published figures. What the model decides for
// the shapes of real models is a tested table (bench/decisions.txt).
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "tensor.h"

namespace fastlora {

struct Gpu {
  int multiprocessors;
  double bandwidth;  // bytes per second that a copy reaches
  double library;    // operations per second of the library's 16-bit products
  double loop;       // of our main loop (gemm_sm80.cuh)
};

constexpr double kLaunch = 2.7e-6;  // seconds that a captured kernel takes beyond its work
constexpr double kStep = 0.38e-6;   // of the loop's step of 32 inputs, however little it computes

// By compute capability. The loop's share of the library: under a third as measured on 9.0, whose
// library has wgmma; less is taken where it has tcgen05, and nine tenths where both use mma.sync
// (sm_80 to sm_89, sm_120).
inline Gpu gpu_of(int capability, int multiprocessors) {
  const double n = multiprocessors;
  if (capability >= 120) return {multiprocessors, 1.6e12, n * 1.2e12, n * 1.1e12};
  if (capability >= 100) return {multiprocessors, 7.0e12, n * 11e12, n * 1.75e12};
  if (capability >= 90) return {multiprocessors, 3.0e12, n * 6.0e12, n * 1.73e12};
  if (capability >= 86) return {multiprocessors, 0.9e12, n * 1.1e12, n * 1.0e12};
  return {multiprocessors, 1.7e12, n * 2.5e12, n * 2.25e12};
}

struct LinearShape {
  int64_t tokens, in, out, rank;
};

// Below one large tile for each multiprocessor of a large GPU the loop takes small ones.
inline bool takes_small_tiles(int64_t tokens, int64_t columns) {
  return ((tokens + 127) / 128) * ((columns + 127) / 128) < 132;
}

// A tile of the loop, as in lora_linear.cu.
struct TileCost {
  int64_t rows, columns;
};

inline double longer(double a, double b) { return a > b ? a : b; }
inline double parts(int64_t n, int64_t of) { return double((n + of - 1) / of); }

// One launch of the loop over `depth` inputs, `extra` columns riding along with every tile: whole
// tiles over the multiprocessors, or the steps of one of them one after the other, or the bytes
// that have to move.
inline double loop_seconds(const Gpu& gpu, int64_t tokens, int64_t out, int64_t depth,
                           int64_t extra, const TileCost& tile, double bytes) {
  const double tiles = parts(tokens, tile.rows) * parts(out, tile.columns);
  // Blocks that share a multiprocessor share its rate; the last wave is as long as any.
  const double each = parts(int64_t(tiles), gpu.multiprocessors);
  const double work = 2.0 * double(tile.rows) * double(tile.columns + extra) * double(depth);
  const double arithmetic = each * work * gpu.multiprocessors / gpu.loop;
  return longer(longer(arithmetic, parts(depth, 32) * kStep), bytes / gpu.bandwidth);
}

constexpr double kElement = 2;  // bytes of a 16-bit number

// The plain layer by the library: the floor of all forms.
inline double plain_seconds(const Gpu& gpu, const LinearShape& s) {
  const double m = double(s.tokens), k = double(s.in), n = double(s.out);
  return longer(2 * m * k * n / gpu.library, kElement * (m * k + k * n + m * n) / gpu.bandwidth) +
         kLaunch;
}

// The library's product, the skinny one, its gate, and the accumulation, which reads and writes y.
inline double products_seconds(const Gpu& gpu, const LinearShape& s) {
  const double m = double(s.tokens), k = double(s.in), n = double(s.out), r = double(s.rank);
  const double skinny = longer(2 * m * k * r / gpu.library, kElement * m * k / gpu.bandwidth);
  const double gate = kElement * 2 * m * r / gpu.bandwidth;
  const double update = longer(2 * m * n * r / gpu.library, kElement * 2 * m * n / gpu.bandwidth);
  return plain_seconds(gpu, s) + skinny + gate + update + 3 * kLaunch;
}

// The skinny launch of ours, then the main one with the rank as further inputs.
inline double extended_seconds(const Gpu& gpu, const LinearShape& s) {
  const double m = double(s.tokens), k = double(s.in), n = double(s.out), r = double(s.rank);
  const TileCost skinny = s.rank <= 16 ? TileCost{64, 16} : TileCost{64, 64};
  const bool few = takes_small_tiles(s.tokens, s.out);
  const TileCost main = few ? TileCost{64, 64} : TileCost{128, 128};
  const double h = loop_seconds(gpu, s.tokens, s.rank, s.in, 0, skinny, kElement * m * k);
  const double y = loop_seconds(gpu, s.tokens, s.out, s.in + s.rank, 0, main,
                                kElement * (m * k + k * n + m * n + m * r));
  return h + y + 1.5 * kLaunch;  // the second launch overlaps the end of the first
}

// One launch, D's rows beside every tile of W.
inline double appended_seconds(const Gpu& gpu, const LinearShape& s) {
  const double m = double(s.tokens), k = double(s.in), n = double(s.out);
  const int64_t extra = s.rank <= 16 ? 16 : 32;
  const bool few = takes_small_tiles(s.tokens, s.out);
  const TileCost tile = few ? TileCost{64, 64} : TileCost{128, 96};
  return loop_seconds(gpu, s.tokens, s.out, s.in + extra, extra, tile,
                      kElement * (m * k + k * n + m * n)) +
         kLaunch;
}

// --- lora_add_ on a GPU: the low-rank part alone, into a y that is there; in = 0: without down ---

// The library's skinny product, a pass over h for the gate, and the accumulation.
inline double add_products_seconds(const Gpu& gpu, const LinearShape& s) {
  const double m = double(s.tokens), k = double(s.in), n = double(s.out), r = double(s.rank);
  const double skinny = longer(2 * m * k * r / gpu.library, kElement * m * k / gpu.bandwidth);
  const double gate = kElement * 2 * m * r / gpu.bandwidth;
  const double update = longer(2 * m * n * r / gpu.library, kElement * 2 * m * n / gpu.bandwidth);
  return skinny + gate + update + (s.in > 0 ? 3 : 2) * kLaunch;
}

// Our loop twice: a gated skinny product (or the gate alone), then over the rank with y read and
// written.
inline double add_kernels_seconds(const Gpu& gpu, const LinearShape& s) {
  const double m = double(s.tokens), k = double(s.in), n = double(s.out), r = double(s.rank);
  const TileCost skinny = s.rank <= 16 ? TileCost{64, 16} : TileCost{64, 64};
  const bool few = takes_small_tiles(s.tokens, s.out);
  const TileCost main = few ? TileCost{64, 64} : TileCost{128, 128};
  const double h = s.in > 0 ? loop_seconds(gpu, s.tokens, s.rank, s.in, 0, skinny, kElement * m * k)
                            : kElement * 2 * m * r / gpu.bandwidth;
  const int64_t depth = (s.rank + 31) / 32 * 32;  // whole steps
  const double y =
      loop_seconds(gpu, s.tokens, s.out, depth, 0, main, kElement * (2 * m * n + m * r + n * r));
  return h + y + 1.5 * kLaunch;  // the second launch overlaps the end of the first
}

// --- fold on a GPU, `bytes` of W, W', D and U ---

inline double fold_seconds(const Gpu& gpu, double bytes) { return bytes / gpu.bandwidth + kLaunch; }

// --- the CPU -------------------------------------------------------------------------------------

// Of one thread where not said otherwise, as measured on two cores of an AMD EPYC (Zen 4, AVX-512)
// with PyTorch 2.13: MKL for float32 and float64, oneDNN for bfloat16, neither for float16.
struct Cpu {
  double library;  // operations per second of the library's product
  double packing;  // seconds an element of W until the library has rearranged it; one thread does
  double loop[3];  // seconds of our loop for an element of W's row and 1, 2, 4 tokens
  double pass;     // operations per second of our pass over x and y
  double bytes;    // of an element
  int threads;
};

constexpr double kPassBandwidth = 25e9;    // bytes per second of a thread: our pass
constexpr double kUpdateBandwidth = 12e9;  // the library's update of y, which comes later
constexpr double kPassPacking = 1e-9;      // seconds an element of D or U
constexpr double kLibraryCall = 3e-6;      // seconds of a call from Python
constexpr double kPassCall = 2e-6;
constexpr double kLoopCall = 1e-6;
constexpr double kFork = 2e-6;   // until another thread works
constexpr double kTileEnd = 44;  // further inputs for which our loop would have time
constexpr int64_t kNear = 2560;  // inputs; rows of W that are longer come later
constexpr double kFar = 1.15;
constexpr int64_t kThreadWork = 1 << 17;  // multiplications of our loop that deserve a thread

inline Cpu cpu_of(DType dtype, Isa isa, int threads) {
  Cpu cpu{98e9, 110e-12, {45e-12, 60e-12, 77e-12}, 85e9, 4, threads};
  if (dtype == DType::kFloat64)
    cpu = {49e9, 220e-12, {110e-12, 150e-12, 240e-12}, 42e9, 8, threads};
  if (dtype == DType::kBFloat16) cpu = {190e9, 60e-12, {50e-12, 74e-12, 100e-12}, 80e9, 2, threads};
  if (dtype == DType::kFloat16) cpu = {13e9, 0, {45e-12, 58e-12, 95e-12}, 80e9, 2, threads};
  const double slower = isa == Isa::kAvx512 ? 1 : isa == Isa::kAvx2 ? 1.3 : 3;
  for (double& seconds : cpu.loop) seconds *= slower;
  cpu.pass /= slower;
  return cpu;
}

// Seconds of a product of the library, [m, k] by [k, n], without its call.
inline double library_seconds(const Cpu& cpu, int64_t m, int64_t k, int64_t n) {
  const double weight = double(k) * double(n);
  return cpu.packing * weight + 2 * double(m) * weight / (cpu.library * cpu.threads);
}

inline double plain_seconds(const Cpu& cpu, const LinearShape& s) {
  return kLibraryCall + library_seconds(cpu, s.tokens, s.in, s.out);
}

// Ours, by rows of W: tokens go four, then two, then one at a time.
inline double loop_seconds(const Cpu& cpu, const LinearShape& s) {
  const double k = double(s.in), n = double(s.out), r = double(s.rank);
  const double tokens = double(s.tokens / 4) * cpu.loop[2] +
                        double(s.tokens % 4 / 2) * cpu.loop[1] + double(s.tokens % 2) * cpu.loop[0];
  const double inputs = (k + r + kTileEnd) * n + (k + kTileEnd) * r;
  const int64_t deserved = 1 + s.tokens * (s.in * s.out + s.rank * (s.in + s.out)) / kThreadWork;
  const double threads = double(deserved < cpu.threads ? deserved : cpu.threads);
  const double far = s.in > kNear && s.tokens > 4 ? kFar : 1;
  return kLoopCall + (threads > 1 ? kFork : 0) + tokens * inputs * far / threads;
}

// Our pass, y += ((x Dᵀ) ∘ g) Uᵀ. Its threads take 48 tokens at a time; without D, in = 0.
inline double pass_seconds(const Cpu& cpu, const LinearShape& s) {
  const double m = double(s.tokens), k = double(s.in), n = double(s.out), r = double(s.rank);
  const double tasks = parts(s.tokens, 48), rounds = parts(int64_t(tasks), cpu.threads);
  const double arithmetic = 2 * m * r * (k + n) / cpu.pass * rounds / tasks;
  const double traffic = cpu.bytes * (m * k + 2 * m * n) / (kPassBandwidth * cpu.threads);
  const double packing = kPassPacking * r * (k + n) / cpu.threads;
  return kPassCall + (tasks > 1 && cpu.threads > 1 ? kFork : 0) + packing + arithmetic + traffic;
}

// fold, for `bytes` of W, W', D and U; two threads saturate the memory.
constexpr double kFoldBandwidth = 29e9;
inline double fold_seconds(double bytes) { return bytes / kFoldBandwidth + kPassCall; }

inline double around_seconds(const Cpu& cpu, const LinearShape& s) {
  return plain_seconds(cpu, s) + pass_seconds(cpu, s);
}

// The library alone: both skinny products, the gate, and y once more through memory.
inline double products_seconds(const Cpu& cpu, const LinearShape& s) {
  const double down = s.in > 0 ? kLibraryCall + library_seconds(cpu, s.tokens, s.in, s.rank) : 0;
  const double up = kLibraryCall + library_seconds(cpu, s.tokens, s.rank, s.out);
  const double traffic =
      cpu.bytes * 2 * double(s.tokens) * double(s.out) / (kUpdateBandwidth * cpu.threads);
  return plain_seconds(cpu, s) + down + kLibraryCall + up + traffic;
}

}  // namespace fastlora
