#pragma once
// A list of tensors as one index space, so that a single parallel region serves 4,000 small tensors
// or one large.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace sfron {

// Work is divided at multiples of 64 elements: a whole mask word, and whole cache lines of every
// dtype.
constexpr int64_t kUnit = 64;
constexpr size_t kSoon = 4;  // tensors ahead: for what is fetched before it is needed
// Units: of fp32 half a MB, long enough for the hardware to fetch ahead within it.
constexpr int64_t kPiece = 2048;

class Runs {
 public:
  // Tensors are anything with `numel`; `unit` elements of one tensor are never divided.
  template <class TensorArgs>
  explicit Runs(const std::vector<TensorArgs>& tensors, int64_t unit = kUnit) : unit_(unit) {
    first_.reserve(tensors.size() + 1);
    numel_.reserve(tensors.size());
    first_.push_back(0);
    for (const TensorArgs& tensor : tensors) {
      first_.push_back(first_.back() + (tensor.numel + unit - 1) / unit);
      numel_.push_back(tensor.numel);
    }
  }

  int64_t units() const { return first_.back(); }
  int64_t unit() const { return unit_; }

  // Calls f(tensor, begin, end) for each stretch of elements in units [begin, end), and
  // ahead(tensor) `kSoon` before.
  template <class F, class Ahead>
  void walk(int64_t begin, int64_t end, const F& f, const Ahead& ahead) const {
    if (begin >= end) return;
    // upper_bound, not lower_bound: it steps over empty tensors, which start where their successor
    // starts
    size_t i = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, first_[i + 1]);
      if (i + kSoon < numel_.size()) ahead(i + kSoon);
      if (stop <= begin) continue;
      f(static_cast<int64_t>(i), (begin - first_[i]) * unit_,
        std::min((stop - first_[i]) * unit_, numel_[i]));
      begin = stop;
    }
  }

  // The same from the end, in pieces: what the pass before has read last may still be in the cache.
  template <class F, class Ahead>
  void walk_back(int64_t begin, int64_t end, const F& f, const Ahead& ahead) const {
    if (begin >= end) return;
    size_t i = std::upper_bound(first_.begin(), first_.end(), end - 1) - first_.begin() - 1;
    for (;; --i) {
      if (i >= kSoon) ahead(i - kSoon);
      for (const int64_t start = std::max(begin, first_[i]); end > start;) {
        const int64_t from = std::max(start, end - kPiece);
        f(static_cast<int64_t>(i), (from - first_[i]) * unit_,
          std::min((end - first_[i]) * unit_, numel_[i]));
        end = from;
      }
      if (end <= begin) return;
    }
  }

  template <class F>
  void walk(int64_t begin, int64_t end, const F& f) const {
    walk(begin, end, f, [](size_t) {});
  }

 private:
  int64_t unit_;
  std::vector<int64_t> first_;  // [tensors + 1] units before each tensor
  std::vector<int64_t> numel_;  // [tensors]
};

}  // namespace sfron
