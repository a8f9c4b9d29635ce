// Arrays of fp16 to fp32 and back, by the processor's own instructions where it has them. They give
// the bits of the formulas (formulas/dtype.h), NaNs included.
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/tiles.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace sfron {
namespace {

#if defined(__x86_64__) && defined(__GNUC__)
// Each returns how many elements it did; the portable loop does the rest. The maskz forms, every
// lane on, spare the undefined register of the plain ones, of which g++ 12 warns. Unrolled, because
// a conversion is two instructions and a turn three.
__attribute__((target("avx,f16c"))) int64_t load_8(const uint16_t* source, float* target,
                                                   int64_t n) {
  int64_t i = 0;
  SFRON_UNROLLED
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(half));
  }
  return i;
}

__attribute__((target("avx,f16c"))) int64_t store_8(const float* source, uint16_t* target,
                                                    int64_t n) {
  int64_t i = 0;
  SFRON_UNROLLED
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), half);
  }
  return i;
}

__attribute__((target("avx512f"))) int64_t load_16(const uint16_t* source, float* target,
                                                   int64_t n) {
  int64_t i = 0;
  SFRON_UNROLLED
  for (; i + 16 <= n; i += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
    _mm512_storeu_ps(target + i, _mm512_maskz_cvtph_ps(0xffff, half));
  }
  return i;
}

__attribute__((target("avx512f"))) int64_t store_16(const float* source, uint16_t* target,
                                                    int64_t n) {
  int64_t i = 0;
  SFRON_UNROLLED
  for (; i + 16 <= n; i += 16) {
    const __m256i half =
        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i), half);
  }
  return i;
}
#endif

}  // namespace

void load_float16(const uint16_t* source, float* target, int64_t n) {
  int64_t i = 0;
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa() == Isa::kAvx512) i = load_16(source, target, n);
  if (isa() == Isa::kAvx2) i = load_8(source, target, n);
#endif
  for (; i < n; ++i) target[i] = from_float16(source[i]);
}

void store_float16(const float* source, uint16_t* target, int64_t n) {
  int64_t i = 0;
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa() == Isa::kAvx512) i = store_16(source, target, n);
  if (isa() == Isa::kAvx2) i = store_8(source, target, n);
#endif
  for (; i < n; ++i) target[i] = to_float16(source[i]);
}

}  // namespace sfron
