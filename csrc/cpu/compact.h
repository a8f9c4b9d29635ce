#pragma once
// What is kept in few bits as tiles of floats: weights in two pieces and moments in codes. A tile
// of codes is one group.
#include <algorithm>
#include <type_traits>

#include "cpu/elements.h"
#include "cpu/lanes.h"
#include "cpu/tiles.h"
#include "formulas/moment_codes.h"
#include "formulas/split_weights.h"

namespace sfron {

static_assert(kGroup <= kTile, "a group fits a tile");

template <class C, int kDropped>
SFRON_HD void join_tile(const uint16_t* param, const C* correction, int64_t n, float* values) {
  SFRON_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) values[i] = join_one<kDropped>(param[i], correction[i]);
}

template <class C, int kDropped>
SFRON_HD void split_tile(const float* values, int64_t at, int64_t n, int64_t step, uint16_t* param,
                         C* correction) {
  SFRON_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const SplitWeight w = split_one<kDropped>(values[i], dither_threshold(at + i, step));
    param[i] = w.param;
    correction[i] = static_cast<C>(w.correction);
  }
}

// Elements [at, at + n) of weights as floats; `corrections` null: they are in one piece.
SFRON_HD float* load_weights(const void* data, DType dtype, const void* corrections, int64_t bytes,
                             int64_t at, int64_t n, float* scratch) {
  if (corrections == nullptr) return load_tile(data, dtype, at, n, scratch);
  const uint16_t* param = static_cast<const uint16_t*>(data) + at;
  if (bytes == 1) {
    join_tile<int8_t, 8>(param, static_cast<const int8_t*>(corrections) + at, n, scratch);
  } else {
    join_tile<int16_t, 0>(param, static_cast<const int16_t*>(corrections) + at, n, scratch);
  }
  return scratch;
}

// Rounds them back; the last bits of a weight in two pieces are dithered by `step`.
SFRON_HD void store_weights(void* data, DType dtype, void* corrections, int64_t bytes, int64_t at,
                            int64_t n, const float* values, int64_t step) {
  if (corrections == nullptr) return store_tile(data, dtype, at, n, values);
  uint16_t* param = static_cast<uint16_t*>(data) + at;
  if (bytes == 1) {
    split_tile<int8_t, 8>(values, at, n, step, param, static_cast<int8_t*>(corrections) + at);
  } else {
    split_tile<int16_t, 0>(values, at, n, step, param, static_cast<int16_t*>(corrections) + at);
  }
}

// The corrections of a tile's slow weights, as the step finds the weights.
SFRON_HD void save_corrections(const WeightCorrections& c, int64_t at, int64_t n) {
  if (c.slow_save == nullptr) return;
  std::memcpy(static_cast<char*>(c.slow_save) + at * c.bytes,
              static_cast<const char*>(c.param) + at * c.bytes, n * c.bytes);
}

// Where the moments of a tensor are codes: the scales [groups, kinds of moments], and the elements
// of one index of the first dimension.
struct Scales {
  float* data;  // or null: they are no codes
  int64_t row, kinds;

  // Elements of the tile that begins at `at`.
  SFRON_HD int64_t tile(int64_t at, int64_t end) const {
    return std::min(data == nullptr ? kTile : group_size(at, row), end - at);
  }
  SFRON_HD float* of(int64_t at, int64_t kind) const {
    return data == nullptr ? nullptr : data + group_index(at, row) * kinds + kind;
  }
  // Of elements [first, last) those whose groups begin there.
  SFRON_HD void whole_groups(int64_t* first, int64_t* last) const {
    if (data == nullptr) return;
    *first = group_from(*first, row);
    *last = group_from(*last, row);
  }
};

// One group of codes, or a tile of any dtype; `narrow`: of bf16 and dithered.
template <bool kSigned>
SFRON_HD float* load_moments(const void* data, DType dtype, const float* scale, int64_t at,
                             int64_t n, float* scratch) {
  if (scale == nullptr) return load_tile(data, dtype, at, n, scratch);
  using Code = std::conditional_t<kSigned, int8_t, uint8_t>;
  const Code* codes = static_cast<const Code*>(data) + at;
  const float factor = *scale;
  SFRON_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) scratch[i] = decode_one<kSigned>(codes[i], factor);
  return scratch;
}

template <bool kSigned>
SFRON_HD void store_moments(void* data, DType dtype, bool narrow, float* scale, int64_t at,
                            int64_t n, const float* values, int64_t step) {
  if (scale != nullptr) {
    using Code = std::conditional_t<kSigned, int8_t, uint8_t>;
    Code* codes = static_cast<Code*>(data) + at;
    int32_t most = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, size_bits(values[i]));
    *scale = scale_of(most);
    const float inverse = 1.0f / *scale;
    SFRON_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      codes[i] = static_cast<Code>(
          encode_one<kSigned>(values[i], inverse, dither_threshold(at + i, step)));
    }
  } else if (narrow) {
    uint16_t* target = static_cast<uint16_t*>(data) + at;
    SFRON_INDEPENDENT
    for (int64_t i = 0; i < n; ++i)
      target[i] = to_bfloat16_dithered(values[i], dither_threshold(at + i, step));
  } else {
    store_tile(data, dtype, at, n, values);
  }
}

}  // namespace sfron
