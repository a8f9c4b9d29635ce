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
  int16_t correction;
};

// kDropped: the bits of fp32 that corrections leave out, 8 or 0.
template <int kDropped>
SFRON_HD float join_one(uint16_t param, int32_t correction) {
  const int32_t value = ((param & 0x7fff) << 16) + correction * (1 << kDropped);
  // a parameter that was set to 0 with a correction below it: 0
  const uint32_t magnitude = static_cast<uint32_t>(value < 0 ? 0 : value);
  return float_of(magnitude | static_cast<uint32_t>(param & 0x8000) << 16);
}

template <int kDropped>
SFRON_HD SplitWeight split_one(float x, uint32_t threshold) {
  constexpr int kKept = 16 - kDropped;  // bits of a correction
  const uint32_t u = bits_of(x);
  const uint32_t whole = (u + (kDropped == 0 ? 0 : threshold >> (16 - kDropped))) >> kDropped;
  const uint32_t top = (whole + (1u << (kKept - 1))) >> kKept;
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : top),
          static_cast<int16_t>(nan ? 0 : static_cast<int32_t>(whole - (top << kKept)))};
}

}  // namespace sfron
