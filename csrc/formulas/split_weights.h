#pragma once
// A weight in two pieces (sfron_fast/ops/split_weights.py): a bf16 parameter, rounded, and a
// correction, by which the bits of both are those of one fp32 number: int16 all of them, int8 all
// but the last 8, which are dithered.
#include "formulas/dtype.h"

namespace sfron {

// The corrections of a tensor's weights; `param` null: it has none.
struct WeightCorrections {
  void* param;            // [numel] int8 or int16, as the others
  void* slow_save;        // [numel] or null, as the tensor's own
  const void* slow_from;  // [numel] or null
  int64_t bytes;          // of one: 1 or 2
};

struct SplitWeight {
  uint16_t param;
  int32_t correction;  // of which only the low bits are stored, one byte or two
};

// kDropped: the bits of fp32 that corrections leave out, 8 or 0.
template <int kDropped>
SFRON_HD float join_one(uint16_t param, int32_t correction) {
  const uint32_t bits = static_cast<uint32_t>(param) << 16;
  // a parameter that was set to 0 with a correction below it: the sign shows it, and it is 0
  const uint32_t sum = bits + static_cast<uint32_t>(correction * (1 << kDropped));
  return float_of(static_cast<int32_t>(sum ^ bits) < 0 ? bits : sum);
}

// What rounding to the parameter leaves is between -half and half of its last bit: as a number of
// as many bits as it has, the low ones of the whole.
template <int kDropped>
SFRON_HD SplitWeight split_one(float x, uint32_t threshold) {
  constexpr int kKept = 16 - kDropped;  // bits of a correction
  const uint32_t dither = kDropped == 0 ? 0 : threshold >> (16 - kDropped);
  const uint32_t bits = x != x ? 0x7fc00000u : bits_of(x) + dither;  // a NaN is any
  const uint32_t whole = bits >> kDropped, top = (whole + (1u << (kKept - 1))) >> kKept;
  return {static_cast<uint16_t>(top), static_cast<int32_t>(whole)};
}

}  // namespace sfron
