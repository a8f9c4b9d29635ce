#pragma once
// A tensor's elements as the loop of a kernel sees them: floats, whatever they are kept as. Where
// they are fp32 or bf16 they stay in memory and are converted in registers, bf16 two by two where
// it can be (Pair); fp16 goes through a scratch tile, and so does bf16 in the norm, which would
// gain nothing (tiles.h). What is kept in few bits: compact.h.
#include "cpu/tiles.h"

namespace sfron {

// The thresholds of a tile's elements (formulas/dtype.h). They are sums, so one number is the
// tile's and the others are always the same: an addition for each in place of a multiplication.
struct Spread {
  uint32_t of[kTile];

  constexpr Spread() : of() {
    for (int64_t i = 0; i < kTile; ++i) of[i] = dither_sum(i, 0);
  }
};
alignas(64) constexpr Spread kSpread;

struct Dither {
  uint32_t first;

  // Of the tile that begins at `at`.
  SFRON_HD Dither(int64_t at, int64_t step) : first(dither_sum(at, step)) {}
  SFRON_HD uint32_t of(int64_t i) const { return (first + kSpread.of[i]) >> 16; }
};

struct BFloat16Cell {  // in memory; read and written as a float
  uint16_t bits;

  SFRON_HD operator float() const { return from_bfloat16(bits); }
  SFRON_HD float operator=(float x) {
    bits = to_bfloat16(x);
    return x;
  }
};

// Neighbours of bf16 are the halves of a word: a shift gives one and an AND the other, where
// vectors of 16 bits would be widened and narrowed by shuffles across their lanes.
struct Pair {
  float low, high;

  SFRON_HD static Pair load(const BFloat16Cell* cells) {
    uint32_t word;
    std::memcpy(&word, cells, sizeof word);
    return {float_of(word << 16), float_of(word & 0xffff0000u)};
  }
  SFRON_HD void store(BFloat16Cell* cells) const {
    const uint32_t word = (bfloat16_above(low) >> 16) | (bfloat16_above(high) & 0xffff0000u);
    std::memcpy(cells, &word, sizeof word);
  }
};

struct DitheredCell {  // the same, of an average that moves by less than it holds
  uint16_t bits;

  SFRON_HD operator float() const { return from_bfloat16(bits); }
};

// Of all views: elements of `data` [at, at + n), null where the tensor is absent; `beside` are the
// corrections of weights or the scale of codes; what the last element is set to is stored by
// store(). `dither` of an element and of a tile: for those who need it.
template <class E>  // float, BFloat16Cell or DitheredCell
class Direct {
 public:
  using Whole = Direct;  // the view of a tensor like it that has nothing beside

  SFRON_HD Direct(const void* data, DType, const void*, int64_t at, int64_t, float*)
      : data_(data == nullptr ? nullptr : static_cast<E*>(const_cast<void*>(data)) + at) {}
  SFRON_HD Direct(const void* data, DType dtype, int64_t at, int64_t n, float* scratch)
      : Direct(data, dtype, nullptr, at, n, scratch) {}

  SFRON_HD E& operator[](int64_t i) const { return data_[i]; }
  SFRON_HD float get(int64_t i) const { return data_[i]; }
  SFRON_HD void set(int64_t i, float x, uint32_t threshold) const {
    if constexpr (std::is_same_v<E, DitheredCell>) {
      data_[i].bits = to_bfloat16_dithered(x, threshold);
    } else {
      data_[i] = x;
    }
  }
  SFRON_HD Pair pair(int64_t i) const { return Pair::load(data_ + i); }
  SFRON_HD void set_pair(int64_t i, const Pair& x) const { x.store(data_ + i); }
  SFRON_HD const E* address() const { return data_; }
  SFRON_HD void store() const {}
  SFRON_HD void store(const Dither&) const {}

 private:
  E* data_;
};

// Whether all views are of bf16 rounded to nearest, whose elements may be taken in pairs.
template <class... Elements>
constexpr bool kPairs = (std::is_same_v<Elements, Direct<BFloat16Cell>> && ...);

// Where a tensor's elements lie, to be added to like a pointer.
struct Memory {
  const char* data;
  int64_t bytes;  // of an element

  SFRON_HD Memory operator+(int64_t elements) const { return {data + elements * bytes, bytes}; }
  SFRON_HD operator const void*() const { return data; }
};

class Tiled {  // of any dtype
 public:
  using Whole = Tiled;

  SFRON_HD Tiled(const void* data, DType dtype, const void*, int64_t at, int64_t n, float* scratch)
      : data_(const_cast<void*>(data)), dtype_(dtype), at_(at), n_(n), values_(nullptr) {
    if (data != nullptr) values_ = load_tile(data, dtype, at, n, scratch);
  }
  SFRON_HD Tiled(const void* data, DType dtype, int64_t at, int64_t n, float* scratch)
      : Tiled(data, dtype, nullptr, at, n, scratch) {}

  SFRON_HD float& operator[](int64_t i) const { return values_[i]; }
  SFRON_HD float get(int64_t i) const { return values_[i]; }
  SFRON_HD void set(int64_t i, float x, uint32_t) const { values_[i] = x; }
  SFRON_HD Memory address() const {
    const int64_t bytes = dtype_bytes(dtype_);
    return {static_cast<const char*>(data_) + at_ * bytes, bytes};
  }
  SFRON_HD void store() const {
    if (data_ != nullptr) store_tile(data_, dtype_, at_, n_, values_);
  }
  SFRON_HD void store(const Dither&) const { store(); }

 private:
  void* data_;
  DType dtype_;
  int64_t at_, n_;
  float* values_;  // [n]
};

template <class Elements>
struct As {};  // tells a kernel how it sees a tensor

// run(As<...>) for the elements of one dtype.
template <class Run>
void with_elements(DType dtype, const Run& run) {
  if (dtype == DType::kFloat16) return run(As<Tiled>{});
  dtype == DType::kFloat32 ? run(As<Direct<float>>{}) : run(As<Direct<BFloat16Cell>>{});
}

}  // namespace sfron
