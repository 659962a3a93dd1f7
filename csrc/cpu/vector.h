// One register of the instruction set that a file in this directory is being compiled for, through
// the vector types of GCC and Clang: arithmetic operators work element by element.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

#if FASTLORA_X86
#include <immintrin.h>
#endif

namespace fastlora {
namespace FASTLORA_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  typedef A anywhere __attribute__((vector_size(kVectorBytes), aligned(sizeof(A)), may_alias));
};
template <class A>
using Vector = typename VectorOf<A>::type;

// At any address that is aligned to one element.
template <class A>
static inline Vector<A> load_vector(const A* from) {
  return *reinterpret_cast<const typename VectorOf<A>::anywhere*>(from);
}
template <class A>
static inline void store_vector(A* to, Vector<A> v) {
  *reinterpret_cast<typename VectorOf<A>::anywhere*>(to) = v;
}

// Writes one register past the caches: memory that is only written need not be read first, and what
// is in the caches stays there. `to` is aligned to kVectorBytes; finish_streams() orders the
// writes.
static inline void stream(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
  _mm256_stream_si256(static_cast<__m256i*>(to),
                      _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#elif FASTLORA_X86
  _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
#else
  std::memcpy(to, from, kVectorBytes);
#endif
}

static inline void finish_streams() {
#if FASTLORA_X86
  _mm_sfence();
#endif
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora
