#pragma once
// Random lists of tensors for the host tests: odd sizes, empty ones, every dtype, pointers off 16
// bytes, and no byte of slack behind a buffer, so that AddressSanitizer sees the first access too
// far.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/tiles.h"

namespace sfron {

inline std::mt19937_64 dice{7};

inline int64_t pick(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(dice() % (high - low + 1));
}
inline bool chance(int percent) {
  return pick(0, 99) < percent;
}

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      std::printf("%s:%d: %s is not true\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                           \
    }                                                                         \
  } while (false)

// [numel] of a dtype, `shift` elements off an address that is a multiple of 16; a copy has its own
// memory.
class Buffer {
 public:
  Buffer() = default;
  Buffer(int64_t numel, DType dtype, int64_t shift) : numel_(numel), shift_(shift), dtype_(dtype) {
    memory_.reset(static_cast<char*>(std::malloc((numel + shift) * dtype_bytes(dtype))), std::free);
  }
  Buffer(const Buffer& other) : Buffer(other.numel_, other.dtype_, other.shift_) {
    if (numel_ > 0) std::memcpy(data(), other.data(), bytes());
  }
  Buffer& operator=(Buffer&&) = default;
  Buffer(Buffer&&) = default;

  char* data() const {
    return numel_ == 0 ? nullptr : memory_.get() + shift_ * dtype_bytes(dtype_);
  }  // as torch does
  int64_t bytes() const { return numel_ * dtype_bytes(dtype_); }
  int64_t numel() const { return numel_; }
  DType dtype() const { return dtype_; }
  float get(int64_t i) const { return load_one(data(), dtype_, i); }
  void set(int64_t i, float x) {
    if (dtype_ == DType::kFloat32) std::memcpy(data() + 4 * i, &x, 4);
    store_tile(data(), dtype_, i, 1, &x);
  }
  bool same(const Buffer& other) const {
    return numel_ == 0 || std::memcmp(data(), other.data(), bytes()) == 0;
  }

 private:
  std::shared_ptr<char> memory_;
  int64_t numel_ = 0, shift_ = 0;
  DType dtype_ = DType::kFloat32;
};

inline int64_t odd_size() {
  static const int64_t sizes[] = {0,    1,    2,    3,    7,    8,    9,    15,   31,
                                  33,   63,   64,   65,   127,  128,  129,  255,  257,
                                  1000, 2047, 2048, 2049, 2056, 4095, 4096, 4103, 6001};
  return chance(80) ? sizes[pick(0, 26)] : pick(0, 3000);
}

inline DType any_dtype() {
  return static_cast<DType>(pick(0, 2));
}

// What a state may have in place of its parameter's dtype.
inline DType other_state(DType param) {
  return param == DType::kFloat32 ? DType::kBFloat16 : DType::kFloat32;
}

inline float dithered(float x, int64_t index, int64_t step) {
  return from_bfloat16(to_bfloat16_dithered(x, dither_threshold(index, step)));
}

inline Buffer random_buffer(int64_t numel, DType dtype, bool positive = false,
                            bool may_shift = true) {
  Buffer buffer(numel, dtype, may_shift && chance(15) ? pick(1, 7) : 0);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < numel; ++i) {
    const float x = normal(dice) * (chance(10) ? 1e-6f : 1.0f);
    buffer.set(i, positive ? std::fabs(x) : x);
  }
  return buffer;
}

// [ceil(numel / 8)] at any address; empty = no mask.
inline std::vector<uint8_t> random_mask(int64_t numel) {
  std::vector<uint8_t> bytes((numel + 7) / 8);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(dice());
  return bytes;
}

inline bool bit(const uint8_t* mask, int64_t i) {
  return mask == nullptr || ((mask[i / 8] >> (i % 8)) & 1) != 0;
}

}  // namespace sfron
