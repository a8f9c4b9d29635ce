#pragma once
// The CPU loops. A mask bit per element defeats the vectoriser, so work goes in blocks of 32 lanes
// that share one mask word; each lane computes and then selects, without branches. Iterations of a
// block must be independent.
#include <cstdint>
#include <cstring>

#include "cpu/isa.h"
#include "formulas/scalar.h"

#if defined(__clang__)
#define SFRON_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define SFRON_ROLLED
#define SFRON_UNROLLED _Pragma("clang loop unroll_count(8)")
#elif defined(__GNUC__)
#define SFRON_INDEPENDENT _Pragma("GCC ivdep")
#define SFRON_ROLLED _Pragma("GCC unroll 1")
#define SFRON_UNROLLED _Pragma("GCC unroll 8")
#else
#define SFRON_INDEPENDENT
#define SFRON_ROLLED
#define SFRON_UNROLLED
#endif

namespace sfron {

constexpr int64_t kLanes = 32;

// Bit j of a word, as memory and not as a shift: then the test is a vector AND on every instruction
// set.
alignas(64) constexpr uint32_t kBit[kLanes] = {
    1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
    1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15,
    1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23,
    1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31};

// Bit 2 j: of the first of two neighbours.
alignas(64) constexpr uint32_t kEvenBit[kLanes / 2] = {
    1u << 0,  1u << 2,  1u << 4,  1u << 6,  1u << 8,  1u << 10, 1u << 12, 1u << 14,
    1u << 16, 1u << 18, 1u << 20, 1u << 22, 1u << 24, 1u << 26, 1u << 28, 1u << 30};

// Compared with the bit and not with 0, which takes a vector instruction more with AVX2.
SFRON_HD bool has_bit(uint32_t word, uint32_t bit) {
  return (word & bit) == bit;
}

// 32 mask bits, the lowest for the first element; compilers make one load of it.
SFRON_HD uint32_t mask_word(const uint8_t* bytes) {
  return bytes[0] | static_cast<uint32_t>(bytes[1]) << 8 | static_cast<uint32_t>(bytes[2]) << 16 |
         static_cast<uint32_t>(bytes[3]) << 24;
}

// Whether one element is selected.
SFRON_HD bool mask_bit(const uint8_t* mask, int64_t i) {
  return mask == nullptr || ((mask[i / 8] >> (i % 8)) & 1) != 0;
}

// Fetches what the streams will need `kAhead` elements later: once per block, as prefetches stop
// the vectoriser. Prefetching beyond the end of a tensor is harmless.
constexpr int64_t kAhead = 512;

SFRON_HD void prefetch_lines(const void* address) {  // the 128 bytes of 32 floats
#if defined(__GNUC__)
  __builtin_prefetch(address);
  __builtin_prefetch(static_cast<const char*>(address) + 64);
#endif
}

template <class... Pointers>
SFRON_HD void prefetch(int64_t i, Pointers... streams) {
  if (kFetchAhead) (prefetch_lines(streams + i + kAhead), ...);
}

// The first 64 elements of a tensor that comes later: small ones lie anywhere, and each would be
// waited for.
inline void prefetch_start(const void* tensor) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(tensor);  // of an empty one null
  for (int line = 0; line < 4; line += 2)
    prefetch_lines(reinterpret_cast<const void*>(start + 64 * line));
}

// The mask from element `at` on. A line of it serves 512 elements, too seldom for the hardware to
// fetch it in time.
SFRON_HD const uint8_t* mask_tile(const uint8_t* mask, int64_t at) {
  if (mask == nullptr) return nullptr;
#if defined(__GNUC__)
  __builtin_prefetch(mask + (at + 3 * kAhead) / 8);
#endif
  return mask + at / 8;
}

// Calls body(i, selected) for i in [0, n); `mask` holds bit i % 8 of byte i / 8, null = all
// selected. ahead(i) is called before each block of 32, to prefetch.
template <class Ahead, class Body>
SFRON_HD void each_lane(int64_t n, const uint8_t* mask, const Ahead& ahead, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const uint32_t word = mask == nullptr ? ~0u : mask_word(mask + i / 8);
    ahead(i);
    SFRON_INDEPENDENT
    for (int64_t j = 0; j < kLanes; ++j) body(i + j, has_bit(word, kBit[j]));
  }
  for (; i < n; ++i) body(i, mask_bit(mask, i));
}

// The same in pairs of neighbours, the first of an even index: pair(i, selected, next_selected).
// What no block covers goes to `body`.
template <class Ahead, class PairBody, class Body>
SFRON_HD void each_pair(int64_t n, const uint8_t* mask, const Ahead& ahead, const PairBody& pair,
                        const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const uint32_t word = mask == nullptr ? ~0u : mask_word(mask + i / 8), next = word >> 1;
    ahead(i);
    SFRON_INDEPENDENT
    for (int64_t j = 0; j < kLanes / 2; ++j)
      pair(i + 2 * j, has_bit(word, kEvenBit[j]), has_bit(next, kEvenBit[j]));
  }
  for (; i < n; ++i) body(i, mask_bit(mask, i));
}

// The bits of the mask as lanes [n], all ones or none, as the words of floats.
SFRON_HD void spread_mask(int64_t n, const uint8_t* mask, float* lanes) {
  each_lane(
      n, mask, [](int64_t) {},
      [=](int64_t i, bool selected) { lanes[i] = float_of(bits_if(selected)); });
}

// Combines the lanes as a tree. Constant bounds: each level is a vector operation or two, if the
// compiler does not unroll it first.
template <int64_t kHalf = kLanes / 2, class T, class Combine>
SFRON_HD T fold_lanes(const T* lane, const Combine& combine) {
  alignas(64) T half[kHalf];
  SFRON_ROLLED
  for (int64_t j = 0; j < kHalf; ++j) half[j] = combine(lane[j], lane[j + kHalf]);
  if constexpr (kHalf > 1) {
    return fold_lanes<kHalf / 2>(half, combine);
  } else {
    return half[0];
  }
}

// Adds term(i, selected), i in [0, n), in double to lane [32]: to lane j the terms j, j + 32, ...
// Together with `sum_of` the order is fixed, so the bits do not depend on the instruction set.
template <class Ahead, class Term>
SFRON_HD void add_lanes(double* lane, int64_t n, const uint8_t* mask, const Ahead& ahead,
                        const Term& term) {
  alignas(64) double sum[kLanes];  // the compiler keeps it in registers
  std::memcpy(sum, lane, sizeof sum);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const uint32_t word = mask == nullptr ? ~0u : mask_word(mask + i / 8);
    ahead(i);
    SFRON_INDEPENDENT
    for (int64_t j = 0; j < kLanes; ++j) sum[j] += term(i + j, has_bit(word, kBit[j]));
  }
  for (int64_t j = 0; i < n; ++i, ++j) {
    sum[j] += term(i, mask_bit(mask, i));
  }
  std::memcpy(lane, sum, sizeof sum);
}

// The lanes [32], added as a tree.
SFRON_HD double sum_of(const double* lane) {
  return fold_lanes(lane, [](double a, double b) { return a + b; });
}

}  // namespace sfron
