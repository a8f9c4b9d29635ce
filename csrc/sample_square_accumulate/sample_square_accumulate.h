#pragma once
// A += weight * sum over samples of |sum over positions of delta x|^power (docs/equations.md, 2):
// the diagonal Fisher of a layer's weight from what it read and the gradient of what it returned.
// Deltas and inputs are read where they lie: a convolution's inputs are a view of the padded image
// in which patches overlap.
#include <cmath>
#include <cstdint>

#include "formulas/scalar.h"

namespace sfron {

// One of the two factors: element (sample, position, lane) lies at sample * stride +
// position_offsets[position] + lane_offsets[lane], in elements.
struct SampleFactor {
  const void* data;
  int64_t stride;                   // between samples
  const int64_t* position_offsets;  // [positions]
  const int64_t* lane_offsets;      // [rows] of deltas, [columns] of inputs
};

struct SampleSquares {
  float* accumulator;  // [rows, columns]
  SampleFactor deltas, inputs;
  int64_t samples, positions, rows, columns;
  int64_t block_rows;  // of a unit of work
  DType dtype;         // of both factors
  float weight;
  int32_t power;  // 1 or 2
};

// A unit of work: so many columns of `block_rows` rows.
constexpr int64_t kSquareColumns = 64;
constexpr int64_t kSquareRows = 64;  // at most

inline int64_t column_units(const SampleSquares& t) {
  return (t.columns + kSquareColumns - 1) / kSquareColumns;
}

inline int64_t square_units(const SampleSquares& t) {
  return (t.rows + t.block_rows - 1) / t.block_rows * column_units(t);
}

// One more sample, whose sum over positions is given.
template <int32_t kPower>
SFRON_HD float sample_accumulate_one(float accumulator, float sum, float weight) {
  if constexpr (kPower == 1) {
    return accumulator + std::fabs(sum) * weight;
  } else {
    return fisher_accumulate_one(accumulator, sum, weight);
  }
}

// Units [begin, end). Samples are added in order and a sample's positions too, whatever the units.
void sample_square_accumulate_cpu(const SampleSquares& t, int64_t begin, int64_t end);

}  // namespace sfron
