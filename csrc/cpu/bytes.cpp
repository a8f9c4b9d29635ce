// Bytes to whole numbers of 32 bits and back, low bytes only: a compiler's loops over both take
// twice the instructions. Where it has none of this machine's, a plain loop.
#include "cpu/bytes.h"

#include <cstring>

#include "cpu/isa.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace sfron {
namespace {

#if defined(__x86_64__) && defined(__GNUC__)
// Each returns how many elements it did, blocks of 32; the plain loop does the rest. The maskz
// forms as in float16.cpp.
constexpr int64_t kBlock = 32;

template <bool kSigned>
__attribute__((target(SFRON_AVX2_TARGET))) int64_t widen_avx2(const void* from, int64_t n,
                                                              float* to) {
  const char* bytes = static_cast<const char*>(from);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    for (int64_t j = i; j < i + kBlock; j += 8) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + j));
      const __m256i wide = kSigned ? _mm256_cvtepi8_epi32(eight) : _mm256_cvtepu8_epi32(eight);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), wide);
    }
  }
  return i;
}

template <bool kSigned>
__attribute__((target(SFRON_AVX512_TARGET))) int64_t widen_avx512(const void* from, int64_t n,
                                                                  float* to) {
  const char* bytes = static_cast<const char*>(from);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    for (int64_t j = i; j < i + kBlock; j += 16) {
      const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + j));
      const __m512i wide = kSigned ? _mm512_maskz_cvtepi8_epi32(0xffff, some)
                                   : _mm512_maskz_cvtepu8_epi32(0xffff, some);
      _mm512_storeu_si512(to + j, wide);
    }
  }
  return i;
}

__attribute__((target(SFRON_AVX2_TARGET))) int64_t narrow_avx2(const float* from, int64_t n,
                                                               char* to) {
  const __m256i low = _mm256_set1_epi32(0xff);
  // packing leaves four numbers of each half together
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const auto eight = [&](int64_t i) __attribute__((target(SFRON_AVX2_TARGET))) {
    return _mm256_and_si256(low, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  };
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    const __m256i words = _mm256_packus_epi32(eight(i), eight(i + 8));
    const __m256i more = _mm256_packus_epi32(eight(i + 16), eight(i + 24));
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, more), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), bytes);
  }
  return i;
}

__attribute__((target(SFRON_AVX512_TARGET))) int64_t narrow_avx512(const float* from, int64_t n,
                                                                   char* to) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    for (int64_t j = i; j < i + kBlock; j += 16) {
      const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, _mm512_loadu_si512(from + j));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), bytes);
    }
  }
  return i;
}
#endif

template <class Byte>
void widen(const Byte* from, int64_t n, float* to) {
  int64_t i = 0;
#if defined(__x86_64__) && defined(__GNUC__)
  constexpr bool kSigned = static_cast<Byte>(-1) < 0;
  const Isa level = isa();
  if (level == Isa::kAvx512) i = widen_avx512<kSigned>(from, n, to);
  if (level == Isa::kAvx2) i = widen_avx2<kSigned>(from, n, to);
#endif
  for (; i < n; ++i) {
    const int32_t wide = from[i];
    std::memcpy(to + i, &wide, 4);
  }
}

}  // namespace

void widen_bytes(const int8_t* from, int64_t n, float* to) {
  widen(from, n, to);
}

void widen_bytes(const uint8_t* from, int64_t n, float* to) {
  widen(from, n, to);
}

void narrow_to_bytes(const float* from, int64_t n, void* to) {
  char* bytes = static_cast<char*>(to);
  int64_t i = 0;
#if defined(__x86_64__) && defined(__GNUC__)
  const Isa level = isa();
  if (level == Isa::kAvx512) i = narrow_avx512(from, n, bytes);
  if (level == Isa::kAvx2) i = narrow_avx2(from, n, bytes);
#endif
  for (; i < n; ++i) {
    uint32_t wide;
    std::memcpy(&wide, from + i, 4);
    bytes[i] = static_cast<char>(wide);
  }
}

}  // namespace sfron
