#pragma once
// Moments in 8 bits (sfron_fast/ops/moment_codes.py): a code is a float with three bits of mantissa
// relative to its group's largest, which is the scale.
#include <cmath>

#include "formulas/dtype.h"

namespace sfron {

constexpr int64_t kGroup = 256;     // elements of a scale
constexpr int64_t kCodedUnit = 32;  // a row is a multiple of it, or its moments are no codes
constexpr int kDroppedBits = 20;    // of fp32, in a code
constexpr int32_t kOneBits = 0x3f800000 >> kDroppedBits;
constexpr float kLeastScale = 0x1p-126f;
constexpr float kLeastCoded = 0x1.4p-16f;  // what code 1 of a signed moment stands for

// Signed codes are int8, the others uint8.
template <bool kSigned>
constexpr int32_t kLargestCode = kSigned ? 127 : 255;

// The first element, from `at` on, that begins a group; a group ends with a row.
SFRON_HD int64_t group_from(int64_t at, int64_t row) {
  const int64_t first = at / row * row, in_row = (at - first + kGroup - 1) / kGroup * kGroup;
  return first + (in_row < row ? in_row : row);
}

// The place of the scale of the group that begins at `at`.
SFRON_HD int64_t group_index(int64_t at, int64_t row) {
  return at / row * ((row + kGroup - 1) / kGroup) + at % row / kGroup;
}

// Elements of the group that begins at `at`.
SFRON_HD int64_t group_size(int64_t at, int64_t row) {
  const int64_t rest = row - at % row;
  return rest < kGroup ? rest : kGroup;
}

template <bool kSigned>
SFRON_HD float decode_one(int32_t code, float scale) {
  const uint32_t magnitude = static_cast<uint32_t>(kSigned && code < 0 ? -code : code);
  const float size = float_of((magnitude + kOneBits - kLargestCode<kSigned>) << kDroppedBits);
  const float value = choose(bits_if(magnitude == 0), 0.0f, size) * scale;
  if (!kSigned) return value;
  return float_of(bits_of(value) | (static_cast<uint32_t>(code) & 0x80000000u));
}

// What a group's largest is found by, as a whole number: a NaN is above all.
SFRON_HD int32_t size_bits(float x) {
  return static_cast<int32_t>(bits_of(x) & 0x7fffffffu);
}

SFRON_HD float scale_of(int32_t most) {
  const float scale = float_of(static_cast<uint32_t>(most));
  return scale < kLeastScale ? kLeastScale : scale;
}

// `inverse` of the scale; the threshold decides between two codes (formulas/dtype.h).
template <bool kSigned>
SFRON_HD int32_t encode_one(float x, float inverse, uint32_t threshold) {
  constexpr int32_t kBelow = kOneBits - kLargestCode<kSigned>;  // bits of what would be code 0
  const uint32_t bits = bits_of(x * inverse) & 0x7fffffffu;
  // not quite from 0 to 1: an ulp of the product changes nothing
  const uint32_t dithered = bits + (threshold << (kDroppedBits - 16)) + 8u;
  int32_t code = static_cast<int32_t>(dithered - (kBelow << kDroppedBits)) >> kDroppedBits;
  code = code > kLargestCode<kSigned> ? kLargestCode<kSigned> : code;
  if (!kSigned) {  // the root of it divides: only 0 is coded as 0
    const int32_t least = x > 0.0f ? 1 : 0;
    return code < least ? least : code;
  }
  const float size = float_of(bits);
  const int32_t few = size * (65536.0f / kLeastCoded) > static_cast<float>(threshold) ? 1 : 0;
  code = size < kLeastCoded ? few : code;
  return x < 0.0f ? -code : code;
}

}  // namespace sfron
