#pragma once
// How the CPU reads the lines of a factor, whose lanes may lie anywhere.
#include <cstring>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/tiles.h"

namespace sfron {

// Lanes that lie one after another, [first, first + length) of a line.
struct Stretch {
  int64_t first, length, offset;
};

// Reads lines of one factor as floats: lanes [begin, begin + n).
class Lines {
 public:
  template <class Factor>
  Lines(const Factor& factor, DType dtype, int64_t begin, int64_t n)
      : data_(factor.data),
        stride_(factor.stride),
        positions_(factor.position_offsets),
        offsets_(factor.lane_offsets + begin),
        n_(n),
        dtype_(dtype) {
    for (int64_t i = 0; i < n; ++i) {
      if (i > 0 && offsets_[i] == offsets_[i - 1] + 1) {
        ++stretches_.back().length;
      } else {
        stretches_.push_back({i, 1, offsets_[i]});
      }
    }
    whole_ = static_cast<int64_t>(stretches_.size()) * 8 <= n;
  }

  int64_t size() const { return n_; }

  // The line where it lies, of fp32 in one stretch; else null.
  SFRON_HD const float* in_place(int64_t sample, int64_t position) const {
    if (dtype_ != DType::kFloat32 || stretches_.size() != 1) return nullptr;
    return static_cast<const float*>(data_) + sample * stride_ + positions_[position] + offsets_[0];
  }

  // Whether these positions lie side by side, in fp32, and lanes do not.
  SFRON_HD bool across(int64_t position, int64_t count) const {
    bool all = !whole_ && dtype_ == DType::kFloat32;
    for (int64_t i = 1; all && i < count; ++i)
      all = positions_[position + i] == positions_[position] + i;
    return all;
  }

  // Writes kCount such lines of target [kCount, width]: lane by lane, so that each line of the
  // cache is met once.
  template <int64_t kCount>
  SFRON_HD void read_across(int64_t sample, int64_t position, float* target, int64_t width) const {
    const float* source =
        static_cast<const float*>(data_) + sample * stride_ + positions_[position];
    for (int64_t lane = 0; lane < n_; ++lane) {
      float found[kCount];
      std::memcpy(found, source + offsets_[lane], sizeof found);
      for (int64_t i = 0; i < kCount; ++i) target[i * width + lane] = found[i];
    }
  }

  // Writes target [n].
  SFRON_HD void read(int64_t sample, int64_t position, float* target, uint16_t* halves) const {
    const int64_t start = sample * stride_ + positions_[position];
    if (whole_) {
      for (const Stretch& s : stretches_) {
        const float* found = load_tile(data_, dtype_, start + s.offset, s.length, target + s.first);
        if (dtype_ == DType::kFloat32) std::memcpy(target + s.first, found, s.length * 4);
      }
    } else if (dtype_ == DType::kFloat32) {
      const float* source = static_cast<const float*>(data_) + start;
      for (int64_t i = 0; i < n_; ++i) target[i] = source[offsets_[i]];
    } else {
      const uint16_t* source = static_cast<const uint16_t*>(data_) + start;
      for (int64_t i = 0; i < n_; ++i) halves[i] = source[offsets_[i]];
      load_tile(halves, dtype_, 0, n_, target);
    }
  }

 private:
  const void* data_;
  int64_t stride_;            // between samples
  const int64_t* positions_;  // where each begins in its sample
  const int64_t* offsets_;    // [n]
  int64_t n_;
  DType dtype_;
  bool whole_;  // in long stretches
  std::vector<Stretch> stretches_;
};

}  // namespace sfron
