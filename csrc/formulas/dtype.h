#pragma once
// bf16 and fp16 as their 16 bits, to float and back.
#include "formulas/scalar.h"

namespace sfron {

SFRON_HD float from_bfloat16(uint16_t h) {
  return float_of(static_cast<uint32_t>(h) << 16);
}

// To nearest, ties to even, by adding just under half a unit to the bits; a NaN could overflow so
// and is replaced. The upper half is the result, the lower one anything.
SFRON_HD uint32_t bfloat16_above(float x) {
  const uint32_t u = bits_of(x);
  return x != x ? 0x7fc00000u : u + 0x7fffu + ((u >> 16) & 1u);
}

SFRON_HD uint16_t to_bfloat16(float x) {
  return static_cast<uint16_t>(bfloat16_above(x) >> 16);
}

// Moves the 15 value bits into place and corrects the exponent; a subnormal is made by subtracting
// the implied one.
SFRON_HD float from_float16(uint16_t h) {
  const uint32_t value = (h & 0x7fffu) << 13, exponent = value & 0x0f800000u;
  const uint32_t shifted = value + ((127 - 15) << 23);
  const uint32_t quiet = value > 0x0f800000u ? 1u << 22 : 0u;       // a NaN becomes quiet
  const uint32_t special = (shifted + ((128 - 16) << 23)) | quiet;  // inf, NaN
  // subnormal, zero
  const uint32_t small = bits_of(float_of(shifted + (1u << 23)) - float_of(113u << 23));
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

// Whether a state is narrower than its weights, as no state of torch's own is. `split`: the
// parameter is one piece of them.
SFRON_HD bool is_narrow(DType state, DType param, bool split = false) {
  return state == DType::kBFloat16 && (param == DType::kFloat32 || split);
}

// A threshold of 16 bits in place of a half, for an average that moves by less than half a unit of
// bf16 a step: rounded to nearest it would stand still. An element's thresholds are spread evenly
// over the steps, by the golden ratio, so what single steps lose adds up to nothing; those of
// neighbours differ. Both numbers count modulo 2^32.
SFRON_HD constexpr uint32_t dither_sum(int64_t index, int64_t step) {
  return static_cast<uint32_t>(index) * 0x85ebca77u + static_cast<uint32_t>(step) * 0x9e3779b9u;
}

SFRON_HD uint32_t dither_threshold(int64_t index, int64_t step) {
  return dither_sum(index, step) >> 16;
}

SFRON_HD uint16_t to_bfloat16_dithered(float x, uint32_t threshold) {
  return static_cast<uint16_t>((x != x ? 0x7fc00000u : bits_of(x) + threshold) >> 16);
}

}  // namespace sfron
