// What a sampler step has to know of a whole sample before it can begin: the standard deviations
// that rescale guidance, and the quantile of |x0| where dynamic thresholding cuts. One block a
// sample. Sums have one order and counts none, so bits depend on the sample alone.
#include "launch.h"
#include "sampler_row.cuh"

namespace fastlora {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kWarp = 32;
constexpr int kBins = 2048;  // 31 bits of |x0| are decided 11, 10 and 10 at a time
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr unsigned kInfinity = 0x7f800000u;

// The sum over all threads, in each of them; `room` [kWarp].
__device__ __forceinline__ double block_sum(double v, double* room) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  __syncthreads();  // who read the last sum has done so
  if (lane == 0) room[warp] = v;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < int(blockDim.x) / kWarp; ++i) total += room[i];
  return total;
}

// Calls f(first, count) for this thread's groups of kWidth elements of a sample.
template <class F>
__device__ __forceinline__ void each_group(int64_t inner, const F& f) {
  for (int64_t first = int64_t(threadIdx.x) * kWidth; first < inner;
       first += int64_t(blockDim.x) * kWidth)
    f(first, inner - first < kWidth ? int(inner - first) : kWidth);
}

// Sums of v - shift and of its square over a group, added in double.
__device__ __forceinline__ void add_moments(const float* v, int count, float shift, double* sums) {
  float first = 0, second = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float d = i < count ? v[i] - shift : 0.0f;
    first += d;
    second += d * d;
  }
  sums[0] += double(first);
  sums[1] += double(second);
}

// phi std(e_0)/std(e) + 1 - phi, about means that are known first: nothing cancels where they are
// far above the deviations.
template <class E>
__device__ __forceinline__ float rescaling(const SamplerStep& p, const float* w, int64_t sample,
                                           bool vectors, double* room) {
  const double n = double(p.inner);
  double variances[2];  // of e_0, of e
  float means[2] = {0, 0};
  for (int pass = 0; pass < 2; ++pass) {
    double sums[4] = {0, 0, 0, 0};
    each_group(p.inner, [&](int64_t first, int count) {
      const int64_t at = sample * p.inner + first;
      float v[kWidth];
      load(static_cast<const E*>(p.outputs[0]) + at, vectors, count, v);
      add_moments(v, count, means[0], sums);
      guide<E, 0, 1>(p, w, at, vectors, count, v);
      add_moments(v, count, means[1], sums + 2);
    });
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const double sum = block_sum(sums[2 * k], room);
      if (pass == 0) {
        means[k] = float(sum / n);
      } else {
        variances[k] = (block_sum(sums[2 * k + 1], room) - sum * sum / n) / (n - 1);
      }
    }
  }
  const float phi = static_cast<const float*>(p.rescale)[p.rescale_batch > 1 ? sample : 0];
  return float(double(phi) * sqrt(variances[0] / variances[1]) + (1 - double(phi)));
}

struct Selection {
  unsigned counts[kBins];
  unsigned digit, below, upto;  // of what a pass has found
  unsigned largest, above;      // of all; the smallest above the element that was looked for
};

// The bin of the element of that rank among what a pass has counted, by the first warp.
__device__ __forceinline__ void find_bin(Selection& s, unsigned rank) {
  constexpr int kEach = kBins / kWarp;
  const int lane = int(threadIdx.x);
  if (lane >= kWarp) return;
  unsigned mine = 0;
  for (int i = 0; i < kEach; ++i) mine += s.counts[lane * kEach + (i + lane) % kEach];
  unsigned upto = mine;  // and all lanes before
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const unsigned before = __shfl_up_sync(kAllLanes, upto, unsigned(offset));
    if (lane >= offset) upto += before;
  }
  unsigned below = upto - mine;
  if (rank < below || rank >= upto) return;
  int bin = lane * kEach;
  while (below + s.counts[bin] <= rank) below += s.counts[bin++];
  s.digit = unsigned(bin);
  s.below = below;
  s.upto = below + s.counts[bin];
}

// Where x0 is cut: between the elements `rank` and `rank` + 1, within [1, threshold_max]. `visit`
// calls its argument with the bits of each of this thread's |x0|, which are ordered as numbers.
template <class Visit>
__device__ __forceinline__ float threshold(const SamplerStep& p, Selection& s, const Visit& visit) {
  unsigned prefix = 0, rank = unsigned(p.rank), upto = 0, shift = 31;
  if (threadIdx.x == 0) {
    s.largest = 0;
    s.above = kAllLanes;
  }
  while (shift > 0) {
    const unsigned width = shift == 31 ? 11 : 10, known = shift;
    shift -= width;
    for (unsigned i = threadIdx.x; i < kBins; i += blockDim.x) s.counts[i] = 0;
    __syncthreads();
    unsigned largest = 0;
    visit([&](unsigned bits) {
      largest = bits > largest ? bits : largest;
      if (bits >> known == prefix) atomicAdd(&s.counts[(bits >> shift) & ((1u << width) - 1)], 1u);
    });
    if (known == 31) atomicMax(&s.largest, largest);
    __syncthreads();
    find_bin(s, rank);
    __syncthreads();
    prefix = (prefix << width) | s.digit;
    rank -= s.below;  // among those of the prefix
    upto = s.upto - s.below;
  }
  if (s.largest > kInfinity) return __uint_as_float(s.largest);  // NaN
  unsigned next = prefix;
  if (p.rank + 1 < p.inner && rank + 1 >= upto) {
    unsigned above = kAllLanes;
    visit([&](unsigned bits) { above = bits > prefix && bits < above ? bits : above; });
    atomicMin(&s.above, above);
    __syncthreads();
    next = s.above;
  }
  const float low = __uint_as_float(prefix), high = __uint_as_float(next);
  const float at = low + float(p.between) * (high - low), most = float(p.threshold_max);
  return at < 1.0f ? 1.0f : at > most ? most : at;
}

// T: the type of x, E: that of the model outputs.
template <class T, class E>
__global__ void __launch_bounds__(kMostThreads)
    sampler_statistics_kernel(SamplerStep p, bool vectors) {
  FASTLORA_SHARED(room, double[kWarp]);
  FASTLORA_SHARED(selection, Selection);
  const int64_t step = *p.step;
  const TableRow r(p, step);
  float* statistics = static_cast<float*>(p.statistics);
  for (int64_t sample = blockIdx.x; sample < p.batch; sample += gridDim.x) {
    const float* w = weights_of(p, step, sample);
    float factor = 1.0f;
    if (p.rescale != nullptr) {
      factor = rescaling<E>(p, w, sample, vectors, room);
      if (threadIdx.x == 0) statistics[2 * sample] = factor;
    }
    if (p.dynamic) {
      const float k_x = r[kKx], k_e = r[kKe];
      const auto visit = [&](const auto& f) {
        each_group(p.inner, [&](int64_t first, int count) {
          const int64_t at = sample * p.inner + first;
          float x[kWidth], e[kWidth];
          load(static_cast<const T*>(p.x) + at, vectors, count, x);
          guide<E, 0, 1>(p, w, at, vectors, count, e);
#pragma unroll
          for (int i = 0; i < kWidth; ++i)
            if (i < count)
              f(__float_as_uint(predicted(k_x, x[i], k_e, e[i] * factor)) & 0x7fffffffu);
        });
      };
      __syncthreads();  // who read the last sample's selection has done so
      const float limit = threshold(p, selection, visit);
      if (threadIdx.x == 0) statistics[2 * sample + 1] = limit;
    }
  }
}

template <class T>
void launch_outputs(const SamplerStep& p, bool vectors, void* stream) {
  const auto kernel = p.output_dtype == DType::kFloat16 ? sampler_statistics_kernel<T, __half>
                      : p.output_dtype == DType::kBFloat16
                          ? sampler_statistics_kernel<T, __nv_bfloat16>
                          : sampler_statistics_kernel<T, float>;
  // As many threads as a sample has groups, a function of its size alone.
  const int64_t warps = (p.inner + kWidth * kWarp - 1) / (kWidth * kWarp);
  const int64_t threads = warps * kWarp < kMostThreads ? warps * kWarp : kMostThreads;
  const int64_t blocks = p.batch < (1 << 30) ? p.batch : (1 << 30);
  launch("sampler_statistics", kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), 0, stream,
         p, vectors);
}

}  // namespace

void launch_sampler_statistics(const SamplerStep& p, int device, void* stream) {
  const DeviceGuard guard(device);
  bool vectors = p.inner % kWidth == 0 && aligned16(p.x);
  for (int j = 0; j < p.n; ++j) vectors = vectors && aligned16(p.outputs[j]);
  if (p.x_dtype == DType::kFloat32) launch_outputs<float>(p, vectors, stream);
  if (p.x_dtype == DType::kFloat16) launch_outputs<__half>(p, vectors, stream);
  if (p.x_dtype == DType::kBFloat16) launch_outputs<__nv_bfloat16>(p, vectors, stream);
}

}  // namespace fastlora
