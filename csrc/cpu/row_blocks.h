#pragma once
// The blocks that the row ops cut a row into: the last elements of one, its maximum, and its part
// of the row's sum of exponentials.
#include <algorithm>
#include <cmath>

#include "cpu/lanes.h"
#include "formulas/softmax.h"

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

// Adds e^(x - shift) of whole groups of 32 in [begin, end) to lane [32]. Computing takes as long as
// memory, so the next block is fetched meanwhile: it lies behind this one, as rows follow each
// other.
SFRON_HD void add_groups(const float* x, int64_t begin, int64_t end, float shift, const char* next,
                         int64_t bytes, float* lane) {
  if (begin == end) return;
  alignas(64) float sum[kLanes];  // the compiler keeps it in registers
  std::copy_n(lane, kLanes, sum);
  for (int64_t i = begin; i + kLanes <= end; i += kLanes) {
    prefetch_lines(next + i * bytes);
    for (int64_t j = 0; j < kLanes; ++j) sum[j] += exp_below_88(x[i + j] - shift);
  }
  std::copy_n(sum, kLanes, lane);
}

// Sum of e^(x - shift), x [n], without the element `left_out`, which may lie outside; at most 64
// additions per lane, then a tree: the same order on every processor.
SFRON_HD float block_sum(const float* x, int64_t n, int64_t left_out, float shift, const char* next,
                         int64_t bytes) {
  alignas(64) float lane[kLanes] = {};
  const bool inside = left_out >= 0 && left_out < n;
  const int64_t whole = n - n % kLanes, group = inside ? left_out - left_out % kLanes : n;
  add_groups(x, 0, std::min(group, whole), shift, next, bytes, lane);
  if (group < whole) {
    alignas(64) float values[kLanes];
    std::copy_n(x + group, kLanes, values);
    values[left_out - group] = -INFINITY;
    add_groups(values, 0, kLanes, shift, next + group * bytes, bytes, lane);
    add_groups(x, group + kLanes, whole, shift, next, bytes, lane);
  }
  if (whole < n) {
    Edge edge(x, n, -INFINITY);
    if (group == whole) edge.values[kLanes - n + left_out] = -INFINITY;
    add_groups(edge.values, 0, kLanes, shift, next, bytes, lane);
  }
  return fold_lanes(lane, [](float a, float b) { return a + b; });
}

// A row so far: its maximum, and the sum of e^(x - row_shift(maximum)) without one element.
struct RowSum {
  float maximum = -INFINITY;
  double others = 0.0;
};

// One more block x [n] of the row; `left_out` may lie outside of it.
SFRON_HD void add_block(RowSum& sum, const float* x, int64_t n, int64_t left_out, const char* next,
                        int64_t bytes) {
  const float largest = block_maximum(x, n);
  if (largest > sum.maximum) {  // what was summed so far was relative to the old maximum
    if (sum.others != 0.0) sum.others *= exp_one(row_shift(sum.maximum) - row_shift(largest));
    sum.maximum = largest;
  }
  if (sum.maximum == INFINITY) {  // only infinities and NaNs matter now
    for (int64_t i = 0; i < n; ++i)
      if (i != left_out && !(x[i] < INFINITY)) sum.others += x[i];
    return;
  }
  sum.others += block_sum(x, n, left_out, row_shift(sum.maximum), next, bytes);
}

}  // namespace sfron
