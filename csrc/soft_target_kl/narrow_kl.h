#pragma once
// Rows of up to 64 classes, 32 of them side by side; soft_target_kl_cpu.cpp has the longer ones.
#include <algorithm>

#include "cpu/lanes.h"
#include "cpu/narrow_rows.h"
#include "cpu/tiles.h"
#include "soft_target_kl/soft_target_kl.h"

namespace sfron {

// y [n] with what its classes are tilted by.
SFRON_HD const float* tilted(const float* y, const float* tilt, int64_t n, float* scratch) {
  SFRON_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) scratch[i] = y[i] + tilt[i];
  return scratch;
}

// Rows [row, row + rows) of up to 64 classes, at most 32; `plain` tells which of them: an infinite
// maximum and a NaN are left to row_forward.
template <bool kWeighted>
SFRON_HD void narrow_forward(const KlRows& t, int64_t row, int64_t rows, Columns& x, Columns& y,
                             float* losses, float* log_sums, bool* plain) {
  const float inverse_temperature = static_cast<float>(1.0 / t.temperature);
  const double square = t.temperature * t.temperature;
  load_columns(t.logits, t.dtype, row, rows, t.classes, x);
  load_columns(t.teacher, t.dtype, row, rows, t.classes, y);
  for (int64_t c = 0; t.tilt != nullptr && c < t.classes; ++c)
    for (int64_t j = 0; j < kLanes; ++j) y.of[c][j] += t.tilt[c];
  alignas(64) Lane shift_x, shift_y, sum_x = {}, sum_y = {}, cross = {};
  [[maybe_unused]] alignas(64) Lane mass = {};
  column_maximum(x, t.classes, shift_x);
  column_maximum(y, t.classes, shift_y);
  for (int64_t c = 0; c < t.classes; ++c) {
    const float k = kWeighted ? t.class_weights[c] : 1.0f;
    SFRON_INDEPENDENT
    for (int64_t j = 0; j < kLanes; ++j) {
      const float a = (y.of[c][j] - shift_y[j]) * inverse_temperature;
      const float b = (x.of[c][j] - shift_x[j]) * inverse_temperature, power = exp_below_88(a);
      const float part = kWeighted ? k * power : power;
      sum_y[j] += power;
      if constexpr (kWeighted) mass[j] += part;
      cross[j] += kl_term_one(part, a, b);
      sum_x[j] += exp_below_88(b);
    }
  }
  alignas(64) Lane loss, log_x, log_y;
  SFRON_INDEPENDENT
  for (int64_t j = 0; j < kLanes; ++j) {
    const double logits = log_above_1(sum_x[j]), teacher = log_above_1(sum_y[j]);
    double kl = static_cast<double>(cross[j]) / sum_y[j];
    if constexpr (kWeighted) {
      const double share = static_cast<double>(mass[j]) / sum_y[j];
      kl += share == 0.0 ? 0.0 : share * (logits - teacher);
      mass[j] = static_cast<float>(share);
    } else {
      kl = kl - teacher + logits;
    }
    loss[j] = static_cast<float>(kl * square);
    log_x[j] = static_cast<float>(logits), log_y[j] = static_cast<float>(teacher);
  }
  for (int64_t j = 0; j < rows; ++j) {
    plain[j] = fabsf(shift_x[j]) < INFINITY && fabsf(shift_y[j]) < INFINITY &&
               sum_x[j] < INFINITY && sum_y[j] < INFINITY;
    if (!plain[j]) continue;
    losses[row + j] = loss[j];
    log_sums[row + j] = shift_x[j], log_sums[t.samples + row + j] = log_x[j];
    log_sums[2 * t.samples + row + j] = shift_y[j], log_sums[3 * t.samples + row + j] = log_y[j];
    if constexpr (kWeighted) log_sums[4 * t.samples + row + j] = mass[j];
  }
}

// What narrow_backward works in: the elements' softmaxes, and tiles for other dtypes.
struct Narrow {
  Repeated base_x, factor_x, base_y, factor_y;
  alignas(64) float x[kNarrow * kLanes], y[kNarrow * kLanes], out[kNarrow * kLanes];
};

template <bool kWeighted>
SFRON_HD void narrow_backward(const KlRows& t, int64_t row, int64_t rows, const float* log_sums,
                              const float* row_weights, Narrow& narrow, void* gradient) {
  const float inverse_temperature = static_cast<float>(1.0 / t.temperature);
  const int64_t classes = t.classes, n = rows * classes, at = row * classes;
  alignas(64) Lane base_x, base_y, factor_x, factor_y;
  const float *sums = log_sums + row, *weights = row_weights + row;
  SFRON_INDEPENDENT
  for (int64_t j = 0; j < rows; ++j) {
    Softmax q, p;
    row_softmaxes<kWeighted>(t, sums + j, weights[j], q, p);
    base_x[j] = q.base, factor_x[j] = q.factor, base_y[j] = p.base, factor_y[j] = p.factor;
  }
  narrow.base_x.fill(base_x, rows, classes), narrow.factor_x.fill(factor_x, rows, classes);
  narrow.base_y.fill(base_y, rows, classes), narrow.factor_y.fill(factor_y, rows, classes);
  const float* x = load_tile(t.logits, t.dtype, at, n, narrow.x);   // [n]
  const float* y = load_tile(t.teacher, t.dtype, at, n, narrow.y);  // [n]
  if (t.tilt != nullptr) {
    for (int64_t i = 0; i < n; i += classes) tilted(y + i, t.tilt, classes, narrow.y + i);
    y = narrow.y;
  }
  for (int64_t i = 0; kWeighted && i < n; i += classes)
    for (int64_t c = 0; c < classes; ++c) narrow.factor_y.of[i + c] *= t.class_weights[c];
  float* out = open_tile(gradient, t.dtype, at, narrow.out);  // [n]
  SFRON_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    out[i] = kl_backward_one(x[i], y[i], inverse_temperature,
                             {narrow.base_x.of[i], narrow.factor_x.of[i]},
                             {narrow.base_y.of[i], narrow.factor_y.of[i]});
  }
  store_tile(gradient, t.dtype, at, n, out);
  for (int64_t j = row; j < row + rows; ++j) {
    if (!kl_counted(t, j)) zero_tile(gradient, t.dtype, j * classes, classes);
  }
}

}  // namespace sfron
