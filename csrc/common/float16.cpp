// fp16 to fp32 and back. The portable text gives the bits that the processors' instructions give,
// NaNs included.
#include "common/dtype.h"
#include "common/isa.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace sfron {
namespace {

// Moves the 15 value bits into place and corrects the exponent; a subnormal is made by subtracting
// the implied one.
SFRON_HD float from_float16(uint16_t h) {
  const uint32_t value = (h & 0x7fffu) << 13, exponent = value & 0x0f800000u;
  const uint32_t shifted = value + ((127 - 15) << 23);
  const uint32_t quiet = value > 0x0f800000u ? 1u << 22 : 0u;       // a NaN becomes quiet
  const uint32_t special = (shifted + ((128 - 16) << 23)) | quiet;  // inf, NaN
  const uint32_t small =
      bits_of(float_of(shifted + (1u << 23)) - float_of(113u << 23));  // subnormal, zero
  const uint32_t magnitude = exponent == 0x0f800000u ? special : exponent == 0 ? small : shifted;
  return float_of(magnitude | (static_cast<uint32_t>(h & 0x8000u) << 16));
}

// To nearest, ties to even. Subnormals let the fp32 adder round: adding 0.5 leaves the half bits at
// the bottom.
SFRON_HD uint16_t to_float16(float x) {
  const uint32_t u = bits_of(x), magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  const uint32_t normal =
      (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const uint32_t large = magnitude > 0x7f800000u ? nan : 0x7c00u;  // NaN : overflow to inf
  const uint32_t finite = magnitude < (113u << 23) ? small : normal;
  return static_cast<uint16_t>(sign | (magnitude >= (143u << 23) ? large : finite));
}

#if defined(__x86_64__) && defined(__GNUC__)
// Each returns how many elements it did; the portable loop does the rest. The maskz forms, every
// lane on, spare the undefined register of the plain ones, of which g++ 12 warns.
__attribute__((target("avx,f16c"))) int64_t load_8(const uint16_t* source, float* target,
                                                   int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(half));
  }
  return i;
}

__attribute__((target("avx,f16c"))) int64_t store_8(const float* source, uint16_t* target,
                                                    int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), half);
  }
  return i;
}

__attribute__((target("avx512f"))) int64_t load_16(const uint16_t* source, float* target,
                                                   int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
    _mm512_storeu_ps(target + i, _mm512_maskz_cvtph_ps(0xffff, half));
  }
  return i;
}

__attribute__((target("avx512f"))) int64_t store_16(const float* source, uint16_t* target,
                                                    int64_t n) {
  int64_t i = 0;
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
