// A warp's matrix instructions. The tables are those of the PTX ISA: which element of which matrix
// lies in which register of which lane.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "block.h"
#include "memory.h"
#include "small_floats.h"

namespace fastlora::emulator {

constexpr unsigned kAllLanes = 0xffffffffu;

inline float float_of(__half v) { return __half2float(v); }
inline float float_of(__nv_bfloat16 v) { return __bfloat162float(v); }

inline uint32_t tf32_of_float(float v) {
  const uint32_t bits = bits_of(v);
  if (std::isnan(v)) return 0x7fffe000u;
  if (std::isinf(v)) return bits;
  return (bits + 0x1000u) & 0xffffe000u;  // to nearest, ties away from zero
}

// Instructions that are `.aligned` want all lanes of a warp, at one place of the program.
inline std::string whole_warp(Here here) {
  if (block().live_lanes() != kAllLanes) fail("a matrix instruction without all 32 lanes", here);
  return " (" + describe(here) + ")";
}

struct Rows {
  const void* row;
  uint32_t* to;          // load
  const uint32_t* from;  // store
};

// Lane l holds elements 2 (l % 4) and the next of row l / 4 of every matrix, or of its column.
inline void move_matrices(const Rows& mine, int count, bool transposed, bool load, const char* kind,
                          Here here) {
  if (int(block().current().lane()) < 8 * count) {
    memory().check(mine.row, 16, 16, load ? "reads a matrix row of" : "writes a matrix row of",
                   here, Space::kShared);
    if (!load) block().wrote(mine.row, 16, here);
  }
  const std::string name = std::string(kind) + ".x" + std::to_string(count) +
                           (transposed ? ".trans" : "") + whole_warp(here);
  block().collective(kAllLanes, name, here, &mine, nullptr, [=](const Arrival* lanes) {
    auto rows = [&](unsigned lane) -> const Rows& {
      return *static_cast<const Rows*>(lanes[lane].in);
    };
    for (int matrix = 0; matrix < count; ++matrix)
      for (unsigned lane = 0; lane < kWarp; ++lane)
        for (unsigned half = 0; half < 2; ++half) {
          const unsigned along = lane / 4, across = lane % 4 * 2 + half;
          const unsigned row = transposed ? across : along, column = transposed ? along : across;
          // Memory is const for the loads only.
          auto* elements =
              static_cast<uint16_t*>(const_cast<void*>(rows(unsigned(8 * matrix) + row).row));
          if (load)
            std::memcpy(reinterpret_cast<char*>(rows(lane).to + matrix) + 2 * half,
                        elements + column, 2);
          else
            std::memcpy(elements + column,
                        reinterpret_cast<const char*>(rows(lane).from + matrix) + 2 * half, 2);
        }
  });
}

inline void load_matrices(uint32_t* to, int count, bool transposed, const void* row, Here here) {
  move_matrices({row, to, nullptr}, count, transposed, true, "ldmatrix", here);
}
inline void store_matrices(void* row, int count, bool transposed, const uint32_t* from, Here here) {
  move_matrices({row, nullptr, from}, count, transposed, false, "stmatrix", here);
}

struct Fragments {
  const uint32_t *a, *b;
  float* sum;
};

// sum += a · b for matrices that `element_a(lanes, row, k)` and `element_b(lanes, k, column)` find
// in the registers. The order of summation on a GPU is not documented: here it is exact up to one
// rounding.
template <class A, class B>
void multiply(float* sum, const uint32_t* a, const uint32_t* b, int depth, const std::string& kind,
              Here here, A element_a, B element_b) {
  const Fragments mine{a, b, sum};
  block().collective(
      kAllLanes, kind + whole_warp(here), here, &mine, nullptr, [=](const Arrival* lanes) {
        auto at = [&](int lane) -> const Fragments& {
          return *static_cast<const Fragments*>(lanes[lane].in);
        };
        for (int lane = 0; lane < int(kWarp); ++lane)
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            double total = at(lane).sum[i];
            for (int k = 0; k < depth; ++k)
              total += double(element_a(at, row, k)) * double(element_b(at, k, column));
            at(lane).sum[i] = float(total);
          }
      });
}

template <class T>
float half_of(uint32_t bits, int which) {
  T v;
  v.bits = uint16_t(bits >> (16 * which));
  return float_of(v);
}

// m16n8k16: A's rows r and r + 8 lie in lanes 4 (r % 8).., two neighbours of k a register; k + 8
// two registers on. B's columns lie in lanes 4 c...
template <class T>
void multiply_16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Here here) {
  multiply(
      sum, a, b, 16, std::is_same_v<T, __half> ? "mma.m16n8k16.f16" : "mma.m16n8k16.bf16", here,
      [](auto at, int row, int k) {
        const int lane = row % 8 * 4 + k % 8 / 2, index = row / 8 + k / 8 * 2;
        return half_of<T>(at(lane).a[index], k % 2);
      },
      [](auto at, int k, int column) {
        return half_of<T>(at(column * 4 + k % 8 / 2).b[k / 8], k % 2);
      });
}

// m16n8k8 of tf32: one element a register, of which the lowest 13 bits are not looked at.
inline void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                          Here here) {
  auto value = [](uint32_t bits) { return float_of(bits & 0xffffe000u); };
  multiply(
      sum, a, b, 8, "mma.m16n8k8.tf32", here,
      [value](auto at, int row, int k) {
        return value(at(row % 8 * 4 + k % 4).a[row / 8 + k / 4 * 2]);
      },
      [value](auto at, int k, int column) { return value(at(column * 4 + k % 4).b[k / 4]); });
}

}  // namespace fastlora::emulator
