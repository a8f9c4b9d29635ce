#pragma once
// Tensors of any dtype as tiles of floats: fp32 memory is used where it lies, bf16 and fp16 are
// converted to a scratch tile in the L1 cache and rounded once when stored. So every kernel has a
// single fp32 text.
#include <cstring>

#include "formulas/dtype.h"

namespace sfron {

constexpr int64_t kTile = 512;  // elements; eight scratch tiles are 16 KB, a third of an L1 cache

struct Scratch {
  alignas(64) float values[kTile];
  operator float*() { return values; }
};

// fp16 arrays; with the processor's own conversion where it has one (cpu/float16.cpp).
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
