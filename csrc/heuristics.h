// Which form of the low-rank linear layer a GPU computes fastest: a model of its time, not a
// measurement. Every number of a GPU is a datasheet's or a published figure until `make gpu` has
// run on one; what the model decides for the shapes of real models is a tested table
// (bench/decisions.txt).
#pragma once

#include <cstdint>

namespace fastlora {

struct Gpu {
  int multiprocessors;
  double bandwidth;  // bytes per second that a copy reaches
  double library;    // operations per second of the library's 16-bit products
  double loop;       // of our main loop (gemm_sm80.cuh)
  double launch;     // seconds from the end of a captured kernel to the start of the next
};

// By compute capability. The loop's share of the library: nine tenths where both use mma.sync
// (sm_80 to sm_89, sm_120), little more than half where the library has wgmma or tcgen05.
inline Gpu gpu_of(int capability, int multiprocessors) {
  const double n = multiprocessors;
  if (capability >= 120) return {multiprocessors, 1.6e12, n * 1.2e12, n * 1.1e12, 1.0e-6};
  if (capability >= 100) return {multiprocessors, 7.0e12, n * 11e12, n * 3.5e12, 1.0e-6};
  if (capability >= 90) return {multiprocessors, 4.3e12, n * 6.0e12, n * 3.3e12, 1.0e-6};
  if (capability >= 86) return {multiprocessors, 0.9e12, n * 1.1e12, n * 1.0e12, 1.2e-6};
  return {multiprocessors, 1.7e12, n * 2.5e12, n * 2.25e12, 1.2e-6};
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
// tiles over the multiprocessors, or the bytes that have to move.
inline double loop_seconds(const Gpu& gpu, int64_t tokens, int64_t out, int64_t depth,
                           int64_t extra, const TileCost& tile, double bytes) {
  const double tiles = parts(tokens, tile.rows) * parts(out, tile.columns);
  // Blocks that share a multiprocessor share its rate; the last wave is as long as any.
  const double each = parts(int64_t(tiles), gpu.multiprocessors);
  const double work = 2.0 * double(tile.rows) * double(tile.columns + extra) * double(depth);
  const double arithmetic = each * work * gpu.multiprocessors / gpu.loop;
  return longer(arithmetic, bytes / gpu.bandwidth);
}

constexpr double kElement = 2;  // bytes of a 16-bit number

// The plain layer by the library: the floor of all forms.
inline double plain_seconds(const Gpu& gpu, const LinearShape& s) {
  const double m = double(s.tokens), k = double(s.in), n = double(s.out);
  return longer(2 * m * k * n / gpu.library, kElement * (m * k + k * n + m * n) / gpu.bandwidth) +
         gpu.launch;
}

// The library's product, the skinny one, its gate, and the accumulation, which reads and writes y.
inline double products_seconds(const Gpu& gpu, const LinearShape& s) {
  const double m = double(s.tokens), k = double(s.in), n = double(s.out), r = double(s.rank);
  const double skinny = longer(2 * m * k * r / gpu.library, kElement * m * k / gpu.bandwidth);
  const double gate = kElement * 2 * m * r / gpu.bandwidth;
  const double update = longer(2 * m * n * r / gpu.library, kElement * 2 * m * n / gpu.bandwidth);
  return plain_seconds(gpu, s) + skinny + gate + update + 3 * gpu.launch;
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
  return h + y + 1.5 * gpu.launch;  // the second launch overlaps the end of the first
}

// One launch, D's rows beside every tile of W.
inline double appended_seconds(const Gpu& gpu, const LinearShape& s) {
  const double m = double(s.tokens), k = double(s.in), n = double(s.out);
  const int64_t extra = s.rank <= 16 ? 16 : 32;
  const bool few = takes_small_tiles(s.tokens, s.out);
  const TileCost tile = few ? TileCost{64, 64} : TileCost{128, 96};
  return loop_seconds(gpu, s.tokens, s.out, s.in + extra, extra, tile,
                      kElement * (m * k + k * n + m * n)) +
         gpu.launch;
}

// --- lora_add_ on a GPU: the low-rank part alone, into a y that is there; in = 0: without down ---

// The library's skinny product, a pass over h for the gate, and the accumulation.
inline double add_products_seconds(const Gpu& gpu, const LinearShape& s) {
  const double m = double(s.tokens), k = double(s.in), n = double(s.out), r = double(s.rank);
  const double skinny = longer(2 * m * k * r / gpu.library, kElement * m * k / gpu.bandwidth);
  const double gate = kElement * 2 * m * r / gpu.bandwidth;
  const double update = longer(2 * m * n * r / gpu.library, kElement * 2 * m * n / gpu.bandwidth);
  return skinny + gate + update + (s.in > 0 ? 3 : 2) * gpu.launch;
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
  return h + y + 1.5 * gpu.launch;  // the second launch overlaps the end of the first
}

}  // namespace fastlora
