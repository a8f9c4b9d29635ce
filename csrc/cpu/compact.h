#pragma once
// What is kept in few bits as the loop of a kernel sees it: weights in two pieces and moments in
// codes, of which a tile is one group. Loops that mix bytes and floats become poor vector code, so
// bytes are widened before and narrowed after.
#include <algorithm>
#include <type_traits>

#include "cpu/bytes.h"
#include "cpu/elements.h"
#include "cpu/lanes.h"
#include "formulas/moment_codes.h"
#include "formulas/split_weights.h"

namespace sfron {

static_assert(kGroup <= kTile, "a group fits a tile");

// Weights in two pieces.
template <class C>  // int8_t or int16_t
class Split {
 public:
  using Whole = Direct<BFloat16Cell>;

  SFRON_HD Split(const void* data, DType, const void* corrections, int64_t at, int64_t n,
                 float* scratch)
      : n_(n), scratch_(scratch) {
    if (data == nullptr) return;
    param_ = static_cast<uint16_t*>(const_cast<void*>(data)) + at;
    corrections_ = static_cast<C*>(const_cast<void*>(corrections)) + at;
    if constexpr (kBytes) widen_bytes(corrections_, n, scratch);
  }

  SFRON_HD float get(int64_t i) const {
    if constexpr (kBytes) {
      return join_one<8>(param_[i], static_cast<int32_t>(bits_of(scratch_[i])));
    } else {
      return join_one<0>(param_[i], corrections_[i]);
    }
  }
  SFRON_HD void set(int64_t i, float x, uint32_t threshold) const {
    const SplitWeight w = split_one<kBytes ? 8 : 0>(x, threshold);
    param_[i] = w.param;
    if constexpr (kBytes) {
      scratch_[i] = float_of(static_cast<uint32_t>(w.correction));
    } else {
      corrections_[i] = static_cast<C>(w.correction);
    }
  }
  SFRON_HD const uint16_t* address() const { return param_; }
  SFRON_HD void store(const Dither&) const {
    if constexpr (kBytes) narrow_to_bytes(scratch_, n_, corrections_);
  }

 private:
  static constexpr bool kBytes = sizeof(C) == 1;
  int64_t n_;
  float* scratch_;             // [n]
  uint16_t* param_ = nullptr;  // [n]
  C* corrections_ = nullptr;   // [n]
};

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

  // Of elements [first, last) those whose groups begin there.
  SFRON_HD void whole_groups(int64_t* first, int64_t* last) const {
    if (data == nullptr) return;
    *first = group_from(*first, row);
    *last = group_from(*last, row);
  }
};

// The groups of a tensor one after another, from one that begins at `at`.
class Groups {
 public:
  SFRON_HD Groups(const Scales& scales, int64_t at)
      : row_(scales.row),
        kinds_(scales.kinds),
        rest_(row_ - at % row_),
        next_(scales.data + group_index(at, row_) * kinds_) {}

  // Elements of the next group, of which scale() then tells.
  SFRON_HD int64_t next() {
    const int64_t n = rest_ < kGroup ? rest_ : kGroup;
    rest_ = n == rest_ ? row_ : rest_ - n;
    scale_ = next_;
    next_ += kinds_;
    return n / kCodedUnit * kCodedUnit;  // no other number, and loops need no ends
  }
  SFRON_HD float* scale(int64_t kind) const { return scale_ + kind; }

 private:
  int64_t row_, kinds_, rest_;
  float* next_;
  float* scale_ = nullptr;
};

// One group of codes; `scale` is its own. The kernel sets every element, finds the largest
// (size_bits), and encodes every element.
template <bool kSigned>
class Codes {
 public:
  using Code = std::conditional_t<kSigned, int8_t, uint8_t>;

  SFRON_HD Codes(const void* data, float* scale, int64_t at, int64_t n, float* scratch)
      : n_(n),
        scratch_(scratch),
        scale_(scale),
        factor_(*scale),
        codes_(static_cast<Code*>(const_cast<void*>(data)) + at) {
    widen_bytes(codes_, n, scratch);
  }

  SFRON_HD float get(int64_t i) const {
    return decode_one<kSigned>(static_cast<int32_t>(bits_of(scratch_[i])), factor_);
  }
  SFRON_HD void set(int64_t i, float x) const { scratch_[i] = x; }
  SFRON_HD float value(int64_t i) const { return scratch_[i]; }  // that it was set to
  SFRON_HD const Code* address() const { return codes_; }

  SFRON_HD float inverse_for(int32_t most) const {
    *scale_ = scale_of(most);
    return 1.0f / *scale_;
  }
  SFRON_HD void encode(int64_t i, float inverse, uint32_t threshold) const {
    const int32_t code = encode_one<kSigned>(scratch_[i], inverse, threshold);
    scratch_[i] = float_of(static_cast<uint32_t>(code));
  }
  SFRON_HD void store() const { narrow_to_bytes(scratch_, n_, codes_); }

 private:
  int64_t n_;
  float* scratch_;  // [n]
  float* scale_;
  float factor_;
  Code* codes_;  // [n]
};

// run(As<...>) for weights in two pieces, or for others by way of tiles.
template <class Run>
void with_tiled_weights(const WeightCorrections& c, const Run& run) {
  if (c.param == nullptr) return run(As<Tiled>{});
  c.bytes == 1 ? run(As<Split<int8_t>>{}) : run(As<Split<int16_t>>{});
}

// run(As<...>, As<...>) for weights and moments by way of tiles, but for bf16 that goes in pairs.
template <class Run>
void with_tiled_weights(DType dtype, const WeightCorrections& c, DType state, const Run& run) {
  using Cells = As<Direct<BFloat16Cell>>;
  const bool pairs = dtype == DType::kBFloat16 && state == DType::kBFloat16;
  if (pairs && c.param == nullptr) return run(Cells{}, Cells{});
  with_tiled_weights(c, [&](auto param) { run(param, As<Tiled>{}); });
}

// run(As<...>, As<...>) for weights and moments that are no codes: of the weights' dtype or fp32,
// or of bf16 and dithered.
template <class Run>
void with_weights(DType dtype, const WeightCorrections& c, DType state, const Run& run) {
  if (dtype == DType::kFloat16) return run(As<Tiled>{}, As<Tiled>{});
  const auto with_state = [&](auto param, auto narrow) {
    state == DType::kFloat32 ? run(param, As<Direct<float>>{}) : run(param, narrow);
  };
  using Narrow = As<Direct<DitheredCell>>;
  if (c.bytes == 1) return with_state(As<Split<int8_t>>{}, Narrow{});
  if (c.bytes == 2) return with_state(As<Split<int16_t>>{}, Narrow{});
  if (dtype == DType::kFloat32) return with_state(As<Direct<float>>{}, Narrow{});
  with_state(As<Direct<BFloat16Cell>>{}, As<Direct<BFloat16Cell>>{});
}

}  // namespace sfron
