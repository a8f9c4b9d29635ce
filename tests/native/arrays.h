#pragma once
// Arrays for the sanitizer harness: exactly sized, misaligned, of random dtypes and contents.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/tiles.h"

using namespace sfron;

// around each block
const int64_t kSizes[] = {0, 1, 7, 31, 32, 33, 63, 64, 65, 511, 513, 1000, 2049, 16384 + 3};

inline uint32_t random_word() {
  static uint32_t state = 2463534242u;
  state ^= state << 13;
  state ^= state >> 17;
  return state ^= state << 5;
}

inline int64_t pick(int64_t n) {
  return random_word() % n;
}
inline float random_float() {
  return static_cast<float>(random_word() % 20001) / 10000.0f - 1.0f;
}
inline DType random_dtype() {
  return static_cast<DType>(pick(3));
}

// What a state may have in place of its parameter's dtype.
inline DType other_state(DType param) {
  return param == DType::kFloat32 ? DType::kBFloat16 : DType::kFloat32;
}

inline float dithered(float x, int64_t index, float step) {
  return from_bfloat16(
      to_bfloat16_dithered(x, dither_threshold(index, static_cast<int64_t>(step))));
}

inline void expect(bool condition, const char* op, const char* what, int64_t i) {
  if (condition) return;
  std::fprintf(stderr, "MISMATCH %s: %s at %lld\n", op, what, static_cast<long long>(i));
  std::exit(1);
}

// n elements that start 0 to 15 elements after an allocation and end with it: one element more is
// an error.
struct Buffer {
  DType dtype;
  int64_t numel;
  std::unique_ptr<char[]> memory;
  char* data;

  Buffer(int64_t n, DType type, bool positive = false) : dtype(type), numel(n) {
    const int64_t offset = pick(16) * dtype_bytes(type);
    memory.reset(new char[offset + n * dtype_bytes(type)]);
    data = memory.get() + offset;
    for (int64_t i = 0; i < n; ++i) set(i, positive ? std::fabs(random_float()) : random_float());
  }
  Buffer(const Buffer& other) : Buffer(other.numel, other.dtype) {
    std::memcpy(data, other.data, numel * dtype_bytes(dtype));
  }
  Buffer(Buffer&&) = default;

  float get(int64_t i) const { return load_one(data, dtype, i); }
  void set(int64_t i, float x) {
    if (dtype == DType::kFloat32) std::memcpy(data + 4 * i, &x, 4);
    store_tile(data, dtype, i, 1, &x);
  }
  bool same(const Buffer& other) const {
    return std::memcmp(data, other.data, numel * dtype_bytes(dtype)) == 0;
  }
};

struct Mask {
  std::vector<uint8_t> bytes;
  bool present;

  explicit Mask(int64_t n) : bytes((n + 7) / 8), present(pick(4) != 0) {
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random_word());
  }
  const uint8_t* data() const { return present ? bytes.data() : nullptr; }
  bool selected(int64_t i) const { return !present || (bytes[i / 8] >> (i % 8) & 1) != 0; }
};

// Calls work(begin, end) over consecutive random pieces, as threads would.
template <class Work>
void in_pieces(int64_t units, const Work& work) {
  for (int64_t begin = 0; begin < units;) {
    const int64_t end = std::min(units, begin + 1 + pick(units));
    work(begin, end);
    begin = end;
  }
}

// A list of all sizes in random dtypes: one list per call also tests the walk over tensor
// boundaries.
inline std::vector<Buffer> buffers(bool fp32 = false, bool positive = false) {
  std::vector<Buffer> list;
  for (const int64_t n : kSizes)
    list.emplace_back(n, fp32 ? DType::kFloat32 : random_dtype(), positive);
  return list;
}

inline std::vector<Buffer> buffers_like(const std::vector<Buffer>& like, bool positive = false) {
  std::vector<Buffer> list;
  for (const Buffer& b : like) list.emplace_back(b.numel, b.dtype, positive);
  return list;
}

// Of the parameters' dtypes, or of the others that a state may have.
inline std::vector<Buffer> states_like(const std::vector<Buffer>& params) {
  std::vector<Buffer> list;
  for (const Buffer& b : params)
    list.emplace_back(b.numel, pick(2) ? b.dtype : other_state(b.dtype));
  return list;
}

inline std::vector<Mask> masks_like(const std::vector<Buffer>& like) {
  std::vector<Mask> list;
  for (const Buffer& b : like) list.emplace_back(b.numel);
  return list;
}
