// The matrix instructions of a warpgroup (wgmma.mma_async, sm_90a). What a warp contributes, 16 of
// the 64 rows, takes effect at some moment between its issue and its wait; until then it reads
// registers and shared memory, and the accumulators hold nothing.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "matrix.h"

namespace fastlora::emulator {

constexpr int kProductDepth = 16, kWarpRows = 16;

// An operand in shared memory, 128-byte swizzle: PTX ISA, "Matrix Descriptor Format".
class SharedOperand {
 public:
  // `mn_major`: neighbours in memory are rows of A or columns of B, not k.
  SharedOperand(uint64_t descriptor, bool mn_major, Here here)
      : start_(field(descriptor, 0)),
        leading_(field(descriptor, 16)),
        stride_(field(descriptor, 32)),
        mn_major_(mn_major),
        here_(here) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
      fail("a wgmma descriptor that is not of the 128-byte swizzle with base offset 0", here);
  }
  // Eight neighbours: k, k + 1, ... of row or column `mn`, or mn, mn + 1, ... at k.
  const uint16_t* eight(int mn, int k) const {
    const uint32_t at = mn_major_
                            ? start_ + uint32_t(k / 8) * stride_ + uint32_t(mn / 64) * leading_ +
                                  uint32_t(k % 8 * 128 + mn % 64 * 2)
                            : start_ + uint32_t(mn / 8) * stride_ + uint32_t(mn % 8 * 128 + k * 2);
    return static_cast<const uint16_t*>(block().read_by_product(at ^ (at >> 7 & 7) << 4, here_));
  }

 private:
  static uint32_t field(uint64_t descriptor, int bit) {
    return uint32_t(descriptor >> bit & 0x3fff) << 4;
  }
  uint32_t start_, leading_, stride_;
  bool mn_major_;
  Here here_;
};

template <class T>
float number(uint16_t bits) {
  T v;
  v.bits = bits;
  return float_of(v);
}

// What a lane brings; `a` is null where A lies in shared memory.
struct ProductOperands {
  float* sums;
  const uint32_t* a;
  uint64_t a_memory, b;
  bool add;
};

// Rows 16 (warp % 4) and on of sums (+)= A B, 64 x 16 by 16 x `columns`. The accumulators of a lane
// are those of mma.m16n8k16 for every eight columns, A's registers are too. The order of summation
// on a GPU is not documented: here it is exact up to one rounding.
template <class T>
void product_of_warp(float* values, const ProductOperands* const (&lanes)[kWarp], unsigned warp,
                     int columns, bool mn_major_b, Here here) {
  const ProductOperands& all = *lanes[0];
  float a[kWarpRows][kProductDepth];
  if (all.a != nullptr) {
    for (int row = 0; row < kWarpRows; ++row)
      for (int k = 0; k < kProductDepth; ++k)
        a[row][k] = half_of<T>(lanes[row % 8 * 4 + k % 8 / 2]->a[row / 8 + k / 8 * 2], k % 2);
  } else {
    const SharedOperand matrix(all.a_memory, false, here);
    for (int row = 0; row < kWarpRows; ++row)
      for (int k = 0; k < kProductDepth; ++k)
        a[row][k] = number<T>(matrix.eight(int(warp % 4) * kWarpRows + row, k & 8)[k % 8]);
  }
  std::vector<float> b(size_t(kProductDepth * columns));
  const SharedOperand matrix(all.b, mn_major_b, here);
  for (int k = 0; k < kProductDepth; k += mn_major_b ? 1 : 8)
    for (int n = 0; n < columns; n += mn_major_b ? 8 : 1) {
      const uint16_t* from = matrix.eight(n, k);
      for (int i = 0; i < 8; ++i)
        b[size_t(mn_major_b ? k * columns + n + i : (k + i) * columns + n)] = number<T>(from[i]);
    }
  std::vector<double> total(static_cast<size_t>(columns));
  for (int row = 0; row < kWarpRows; ++row) {
    auto at = [&](int n) -> float& {  // [lane][register]
      return values[(row % 8 * 4 + n % 8 / 2) * (columns / 2) + n / 8 * 4 + row / 8 * 2 + n % 2];
    };
    for (int n = 0; n < columns; ++n) total[size_t(n)] = all.add ? double(at(n)) : 0.0;
    for (int k = 0; k < kProductDepth; ++k)
      for (int n = 0; n < columns; ++n)
        total[size_t(n)] += double(a[row][k]) * double(b[size_t(k * columns + n)]);
    for (int n = 0; n < columns; ++n) at(n) = float(total[size_t(n)]);
  }
}

template <class T>
void wgmma(const ProductOperands& mine, int columns, bool mn_major_b, Here here) {
  if (!block().current().registers_fenced)
    fail("a wgmma without a wgmma.fence since the last wait for one", here);
  const std::string kind = "wgmma.m64n" + std::to_string(columns) + "k16" + whole_warp(here);
  block().collective(kAllLanes, kind, here, &mine, nullptr, [=](const Arrival* arrived) {
    std::vector<ProductOperands> copies;
    float* sums[kWarp];
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      copies.push_back(*static_cast<const ProductOperands*>(arrived[lane].in));
      const ProductOperands &first = copies[0], &other = copies[lane];
      sums[lane] = other.sums;
      if (first.a_memory != other.a_memory || first.b != other.b || first.add != other.add)
        fail("a wgmma whose operands differ in lane " + std::to_string(lane), here);
    }
    Product product;
    product.here = here;
    const unsigned warp = block().current().warp();
    product.add_to = [=](float* values) {
      const ProductOperands* lanes[kWarp];
      for (unsigned lane = 0; lane < kWarp; ++lane) lanes[lane] = &copies[lane];
      product_of_warp<T>(values, lanes, warp, columns, mn_major_b, here);
    };
    const std::string what =
        kind + " of " + std::to_string(copies[0].a_memory) + " and " + std::to_string(copies[0].b);
    block().issue_product(std::move(product), sums, size_t(columns) / 2, what);
  });
}

}  // namespace fastlora::emulator
