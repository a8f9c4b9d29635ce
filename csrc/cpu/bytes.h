#pragma once
// Arrays of bytes to whole numbers and back, which lie in scratch tiles of floats: as their words.
#include <cstdint>

namespace sfron {

void widen_bytes(const int8_t* from, int64_t n, float* to);
void widen_bytes(const uint8_t* from, int64_t n, float* to);
void narrow_to_bytes(const float* from, int64_t n, void* to);  // the low byte of each

}  // namespace sfron
