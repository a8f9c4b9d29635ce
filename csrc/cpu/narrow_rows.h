#pragma once
// Rows of few classes, 32 of them side by side: a row is a lane, and a class a step of the loop. A
// row by itself would leave most of its lanes empty and still pay for the trees that fold them.
#include <algorithm>

#include "cpu/lanes.h"
#include "cpu/tiles.h"

namespace sfron {

constexpr int64_t kNarrow = 64;  // classes at most: as many additions as a lane of a block has

using Lane = float[kLanes];  // of 32 rows, one number each

// Up to 32 rows, transposed: [classes][rows].
struct Columns {
  alignas(64) Lane of[kNarrow];
  alignas(64) float tile[kNarrow * kLanes];  // the rows as floats, if they are of another dtype
};

// Rows [row, row + rows) of `data` [.., classes]; the other lanes are 0.
SFRON_HD void load_columns(const void* data, DType dtype, int64_t row, int64_t rows,
                           int64_t classes, Columns& columns) {
  const float* x = load_tile(data, dtype, row * classes, rows * classes, columns.tile);
  for (int64_t c = 0; c < classes; ++c) {
    if (rows == kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) columns.of[c][j] = x[j * classes + c];
    } else {
      for (int64_t j = 0; j < kLanes; ++j) columns.of[c][j] = j < rows ? x[j * classes + c] : 0.0f;
    }
  }
}

SFRON_HD void column_maximum(const Columns& columns, int64_t classes, float* maximum) {  // [32]
  alignas(64) Lane most;
  for (int64_t j = 0; j < kLanes; ++j) most[j] = -INFINITY;
  for (int64_t c = 0; c < classes; ++c) {
    const float* x = columns.of[c];
    for (int64_t j = 0; j < kLanes; ++j) most[j] = x[j] > most[j] ? x[j] : most[j];
  }
  std::copy_n(most, kLanes, maximum);
}

// A number of each row beside every element of it: [rows, classes], as the rows lie.
struct Repeated {
  static constexpr int64_t kChunk = 8;  // written at once, also over what follows
  alignas(64) float of[kNarrow * kLanes + kChunk];

  SFRON_HD void fill(const float* values, int64_t rows, int64_t classes) {  // values [rows]
    for (int64_t j = 0; j < rows; ++j) {
      for (int64_t c = 0; c < classes; c += kChunk) {
        for (int64_t k = 0; k < kChunk; ++k) of[j * classes + c + k] = values[j];
      }
    }
  }
};

}  // namespace sfron
