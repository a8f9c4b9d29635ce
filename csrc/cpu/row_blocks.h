#pragma once
// The blocks that the row ops cut a row into: the last elements of one, and its maximum.
#include <cmath>

#include "cpu/lanes.h"

namespace sfron {

// A row is taken in blocks that stay in the L1 cache between their maximum and their sum, so memory
// is read once.
constexpr int64_t kRowBlock = 2048;

// The last n % 32 elements of x [n] as a whole group of lanes, filled up with a value that does not
// count. The lanes end where x ends, so that they can be read at once where there are enough
// elements before.
struct Edge {
  alignas(64) float values[kLanes];

  SFRON_HD Edge(const float* x, int64_t n, float filling) {
    const int64_t rest = n % kLanes, skip = kLanes - rest;
    if (n >= kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) values[j] = j >= skip ? x[n - kLanes + j] : filling;
    } else {
      for (int64_t j = 0; j < kLanes; ++j) values[j] = filling;
      for (int64_t j = 0; j < rest; ++j) values[skip + j] = x[j];
    }
  }
};

SFRON_HD float block_maximum(const float* x, int64_t n) {  // x [n]
  alignas(64) float lane[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) lane[j] = -INFINITY;
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
  }
  if (n % kLanes != 0) {
    const Edge edge(x, n, -INFINITY);
    for (int64_t j = 0; j < kLanes; ++j)
      lane[j] = edge.values[j] > lane[j] ? edge.values[j] : lane[j];
  }
  return fold_lanes(lane, [](float a, float b) { return b > a ? b : a; });
}

}  // namespace sfron
