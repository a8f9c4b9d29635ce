#pragma once
// Tensors of any dtype as tiles of floats: fp32 memory is used where it lies, bf16 and fp16 are
// converted to a scratch tile in the L1 cache and rounded once when stored. So every kernel has a
// single fp32 text.
#include <cstring>

#include "common/hd.h"

namespace sfron {

constexpr int64_t kTile = 512;  // elements; eight scratch tiles are 16 KB, a third of an L1 cache

struct Scratch {
  alignas(64) float values[kTile];
  operator float*() { return values; }
};

SFRON_HD float from_bfloat16(uint16_t h) {
  return float_of(static_cast<uint32_t>(h) << 16);
}

// To nearest, ties to even, by adding just under half a unit to the bits; a NaN could overflow so
// and is replaced.
SFRON_HD uint16_t to_bfloat16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Whether a state is narrower than its parameter, as no state of torch's own is.
SFRON_HD bool is_narrow(DType state, DType param) {
  return state == DType::kBFloat16 && param == DType::kFloat32;
}

// A threshold of 16 bits in place of a half, for an average that moves by less than half a unit of
// bf16 a step: rounded to nearest it would stand still. An element's thresholds are spread evenly
// over the steps, by the golden ratio, so what single steps lose adds up to nothing; those of
// neighbours differ. Both numbers count modulo 2^32.
SFRON_HD uint32_t dither_threshold(int64_t index, int64_t step) {
  return (static_cast<uint32_t>(index) * 0x85ebca77u + static_cast<uint32_t>(step) * 0x9e3779b9u) >>
         16;
}

SFRON_HD uint16_t to_bfloat16_dithered(float x, uint32_t threshold) {
  const uint32_t u = bits_of(x);
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (u + threshold) >> 16);
}

// fp16 arrays; with the processor's own conversion where it has one (common/float16.cpp).
void load_float16(const uint16_t* source, float* target, int64_t n);
void store_float16(const float* source, uint16_t* target, int64_t n);

// Elements [at, at + n) of `data` as floats: in place for fp32, else converted into the scratch
// [n].
inline float* load_tile(const void* data, DType dtype, int64_t at, int64_t n, float* scratch) {
  if (dtype == DType::kFloat32) return static_cast<float*>(const_cast<void*>(data)) + at;
  const uint16_t* source = static_cast<const uint16_t*>(data) + at;
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) scratch[i] = from_bfloat16(source[i]);
  } else {
    load_float16(source, scratch, n);
  }
  return scratch;
}

// Where the results of a tile go before `store_tile`: the memory itself for fp32, else the scratch.
inline float* open_tile(void* data, DType dtype, int64_t at, float* scratch) {
  return dtype == DType::kFloat32 ? static_cast<float*>(data) + at : scratch;
}

// A single element.
inline float load_one(const void* data, DType dtype, int64_t at) {
  float value;
  return *load_tile(data, dtype, at, 1, &value);
}

inline void zero_tile(void* target, DType dtype, int64_t at, int64_t n) {
  const int64_t bytes = dtype_bytes(dtype);
  std::memset(static_cast<char*>(target) + at * bytes, 0, n * bytes);
}

// Rounds a tile of bf16 or fp16 back to memory; a tile of fp32 is already there.
inline void store_tile(void* data, DType dtype, int64_t at, int64_t n, const float* values) {
  uint16_t* target = static_cast<uint16_t*>(data) + at;
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) target[i] = to_bfloat16(values[i]);
  } else if (dtype == DType::kFloat16) {
    store_float16(values, target, n);
  }
}

}  // namespace sfron
