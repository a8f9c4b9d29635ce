#include "soft_target_kl/soft_target_kl.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/narrow_rows.h"
#include "cpu/row_blocks.h"
#include "cpu/tiles.h"

namespace sfron {
namespace {

// Sums of one block or row, relative to the maxima m of the logits and of the teacher, both over T.
struct Sums {
  double logits, teacher;  // of e^(x - m)
  double cross;            // of e^(teacher - m) ((teacher - m) - (logit - m))
};

struct Maxima {
  float logits, teacher;
};

// At most 64 additions per lane, then a tree: the same order on every processor. The next block is
// fetched meanwhile.
SFRON_HD Sums block_sums(const float* x, const float* y, int64_t n, Maxima shift,
                         float inverse_temperature, const char* next_x, const char* next_y,
                         int64_t bytes) {  // x, y [n]: logits, teacher
  alignas(64) float logits[kLanes] = {}, teacher[kLanes] = {}, cross[kLanes] = {};
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    prefetch_lines(next_x + i * bytes);
    prefetch_lines(next_y + i * bytes);
    for (int64_t j = 0; j < kLanes; ++j) {
      const float a = (y[i + j] - shift.teacher) * inverse_temperature;
      const float b = (x[i + j] - shift.logits) * inverse_temperature, power = exp_one(a);
      teacher[j] += power;
      cross[j] += kl_term_one(power, a, b);
      logits[j] += exp_one(b);
    }
  }
  if (n % kLanes != 0) {
    const Edge edge_x(x, n, -INFINITY), edge_y(y, n, -INFINITY);
    for (int64_t j = 0; j < kLanes; ++j) {
      const float a = (edge_y.values[j] - shift.teacher) * inverse_temperature;
      const float b = (edge_x.values[j] - shift.logits) * inverse_temperature, power = exp_one(a);
      teacher[j] += power;
      cross[j] += kl_term_one(power, a, b);
      logits[j] += exp_one(b);
    }
  }
  const auto add = [](float a, float b) { return a + b; };
  return {fold_lanes(logits, add), fold_lanes(teacher, add), fold_lanes(cross, add)};
}

// Sums so far, now relative to larger maxima.
SFRON_HD void rescale(Sums& sums, Maxima old, Maxima now, float inverse_temperature) {
  const float by_teacher = (row_shift(old.teacher) - row_shift(now.teacher)) * inverse_temperature;
  const float by_logits = (row_shift(old.logits) - row_shift(now.logits)) * inverse_temperature;
  if (sums.teacher != 0.0) {  // each difference in `cross` changes by as much
    sums.cross += sums.teacher * (static_cast<double>(by_teacher) - by_logits);
    sums.cross *= exp_one(by_teacher);
    sums.teacher *= exp_one(by_teacher);
  }
  if (sums.logits != 0.0) sums.logits *= exp_one(by_logits);
}

SFRON_HD void row_forward(const KlRows& t, int64_t row, float* scratch_x, float* scratch_y,
                          float* losses, float* log_sums) {
  const float inverse_temperature = static_cast<float>(1.0 / t.temperature);
  const int64_t bytes = dtype_bytes(t.dtype);
  Maxima maxima{-INFINITY, -INFINITY};
  Sums sums{0.0, 0.0, 0.0};
  for (int64_t at = 0; at < t.classes; at += kRowBlock) {
    const int64_t n = std::min(kRowBlock, t.classes - at), start = row * t.classes + at;
    const float* x = load_tile(t.logits, t.dtype, start, n, scratch_x);   // [n]
    const float* y = load_tile(t.teacher, t.dtype, start, n, scratch_y);  // [n]
    const Maxima now{std::max(maxima.logits, block_maximum(x, n)),
                     std::max(maxima.teacher, block_maximum(y, n))};
    if (at > 0) rescale(sums, maxima, now, inverse_temperature);
    maxima = now;
    const Maxima shift{row_shift(now.logits), row_shift(now.teacher)};
    const char* next_x = static_cast<const char*>(t.logits) + (start + n) * bytes;
    const char* next_y = static_cast<const char*>(t.teacher) + (start + n) * bytes;
    const Sums more = block_sums(x, y, n, shift, inverse_temperature, next_x, next_y, bytes);
    sums.logits += more.logits, sums.teacher += more.teacher, sums.cross += more.cross;
  }
  const double logits = row_log(maxima.logits, sums.logits),
               teacher = row_log(maxima.teacher, sums.teacher);
  const double kl = sums.cross / sums.teacher - teacher + logits;
  losses[row] = static_cast<float>(kl * t.temperature * t.temperature);
  log_sums[row] = row_shift(maxima.logits), log_sums[t.samples + row] = static_cast<float>(logits);
  log_sums[2 * t.samples + row] = row_shift(maxima.teacher),
                           log_sums[3 * t.samples + row] = static_cast<float>(teacher);
}

// x, y, out [n]: logits, teacher, gradient, in memory of its own. The last lanes end where x ends:
// some are computed twice.
SFRON_HD void block_backward(const float* x, const float* y, int64_t n, float inverse_temperature,
                             Softmax q, Softmax p, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t at = std::min(i, n - kLanes);
    if (at < 0) break;
    prefetch_lines(x + i + kAhead);
    prefetch_lines(y + i + kAhead);
    SFRON_INDEPENDENT
    for (int64_t j = 0; j < kLanes; ++j)
      out[at + j] = kl_backward_one(x[at + j], y[at + j], inverse_temperature, q, p);
  }
  if (n >= kLanes) return;
  Edge edge_x(x, n, 0.0f);
  const Edge edge_y(y, n, 0.0f);
  for (int64_t j = 0; j < kLanes; ++j) {
    edge_x.values[j] =
        kl_backward_one(edge_x.values[j], edge_y.values[j], inverse_temperature, q, p);
  }
  std::copy_n(edge_x.values + kLanes - n, n, out);
}

// Rows [row, row + rows) of up to 64 classes, at most 32; `plain` tells which of them: an infinite
// maximum and a NaN are left to row_forward.
SFRON_HD void narrow_forward(const KlRows& t, int64_t row, int64_t rows, Columns& x, Columns& y,
                             float* losses, float* log_sums, bool* plain) {
  const float inverse_temperature = static_cast<float>(1.0 / t.temperature);
  const double square = t.temperature * t.temperature;
  load_columns(t.logits, t.dtype, row, rows, t.classes, x);
  load_columns(t.teacher, t.dtype, row, rows, t.classes, y);
  alignas(64) Lane shift_x, shift_y, sum_x = {}, sum_y = {}, cross = {};
  column_maximum(x, t.classes, shift_x);
  column_maximum(y, t.classes, shift_y);
  for (int64_t c = 0; c < t.classes; ++c) {
    SFRON_INDEPENDENT
    for (int64_t j = 0; j < kLanes; ++j) {
      const float a = (y.of[c][j] - shift_y[j]) * inverse_temperature;
      const float b = (x.of[c][j] - shift_x[j]) * inverse_temperature, power = exp_below_88(a);
      sum_y[j] += power;
      cross[j] += kl_term_one(power, a, b);
      sum_x[j] += exp_below_88(b);
    }
  }
  alignas(64) Lane loss, log_x, log_y;
  SFRON_INDEPENDENT
  for (int64_t j = 0; j < kLanes; ++j) {
    const double logits = log_above_1(sum_x[j]), teacher = log_above_1(sum_y[j]);
    const double kl = static_cast<double>(cross[j]) / sum_y[j] - teacher + logits;
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
  }
}

// What narrow_backward works in: the elements' softmaxes, and tiles for other dtypes.
struct Narrow {
  Repeated base_x, factor_x, base_y, factor_y;
  alignas(64) float x[kNarrow * kLanes], y[kNarrow * kLanes], out[kNarrow * kLanes];
};

SFRON_HD void narrow_backward(const KlRows& t, int64_t row, int64_t rows, const float* log_sums,
                              const float* row_weights, Narrow& narrow, void* gradient) {
  const float inverse_temperature = static_cast<float>(1.0 / t.temperature);
  const int64_t classes = t.classes, n = rows * classes, at = row * classes;
  alignas(64) Lane base_x, base_y, factor_x, factor_y;
  const float *sums = log_sums + row, *weights = row_weights + row;
  SFRON_INDEPENDENT
  for (int64_t j = 0; j < rows; ++j) {
    const Softmax q = weighted_softmax({sums[j], sums[t.samples + j]}, weights[j]);
    const Softmax p =
        weighted_softmax({sums[2 * t.samples + j], sums[3 * t.samples + j]}, weights[j]);
    base_x[j] = q.base, factor_x[j] = q.factor, base_y[j] = p.base, factor_y[j] = p.factor;
  }
  narrow.base_x.fill(base_x, rows, classes), narrow.factor_x.fill(factor_x, rows, classes);
  narrow.base_y.fill(base_y, rows, classes), narrow.factor_y.fill(factor_y, rows, classes);
  const float* x = load_tile(t.logits, t.dtype, at, n, narrow.x);   // [n]
  const float* y = load_tile(t.teacher, t.dtype, at, n, narrow.y);  // [n]
  float* out = open_tile(gradient, t.dtype, at, narrow.out);        // [n]
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

struct ForwardKernel {
  void operator()(const KlRows& t, int64_t begin, int64_t end, float* losses,
                  float* log_sums) const {
    if (t.classes > kNarrow) return wide(t, begin, end, losses, log_sums);
    Columns x, y;
    bool plain[kLanes];
    for (int64_t row = begin; row < end; row += kLanes) {
      const int64_t rows = std::min(kLanes, end - row);
      narrow_forward(t, row, rows, x, y, losses, log_sums, plain);
      for (int64_t j = 0; j < rows; ++j) {
        if (!plain[j] || !kl_counted(t, row + j)) wide(t, row + j, row + j + 1, losses, log_sums);
      }
    }
  }

 private:
  void wide(const KlRows& t, int64_t begin, int64_t end, float* losses, float* log_sums) const {
    alignas(64) float scratch_x[kRowBlock], scratch_y[kRowBlock];
    for (int64_t row = begin; row < end; ++row) {
      losses[row] = 0.0f;
      for (int64_t i = 0; i < 4; ++i) log_sums[i * t.samples + row] = 0.0f;
      if (kl_counted(t, row)) row_forward(t, row, scratch_x, scratch_y, losses, log_sums);
    }
  }
};

struct BackwardKernel {
  void operator()(const KlRows& t, int64_t begin, int64_t end, const float* log_sums,
                  const float* row_weights, void* gradient) const {
    alignas(64) float scratch_x[kRowBlock], scratch_y[kRowBlock], result[kRowBlock];
    const float inverse_temperature = static_cast<float>(1.0 / t.temperature);
    Narrow narrow;
    for (int64_t row = begin; t.classes <= kNarrow && row < end; row += kLanes)
      narrow_backward(t, row, std::min(kLanes, end - row), log_sums, row_weights, narrow, gradient);
    for (int64_t row = begin; t.classes > kNarrow && row < end; ++row) {
      if (!kl_counted(t, row)) {
        zero_tile(gradient, t.dtype, row * t.classes, t.classes);
        continue;
      }
      const float* sums = log_sums + row;
      const Softmax q = weighted_softmax({sums[0], sums[t.samples]}, row_weights[row]);
      const Softmax p =
          weighted_softmax({sums[2 * t.samples], sums[3 * t.samples]}, row_weights[row]);
      for (int64_t at = 0; at < t.classes; at += kRowBlock) {
        const int64_t n = std::min(kRowBlock, t.classes - at), start = row * t.classes + at;
        const float* x = load_tile(t.logits, t.dtype, start, n, scratch_x);   // [n]
        const float* y = load_tile(t.teacher, t.dtype, start, n, scratch_y);  // [n]
        float* out = open_tile(gradient, t.dtype, start, result);             // [n]
        block_backward(x, y, n, inverse_temperature, q, p, out);
        store_tile(gradient, t.dtype, start, n, out);
      }
    }
  }
};

}  // namespace

void soft_target_kl_cpu(const KlRows& t, int64_t begin, int64_t end, float* losses,
                        float* log_sums) {
  run_isa(ForwardKernel{}, t, begin, end, losses, log_sums);
}

void soft_target_kl_backward_cpu(const KlRows& t, int64_t begin, int64_t end, const float* log_sums,
                                 const float* row_weights, void* gradient) {
  run_isa(BackwardKernel{}, t, begin, end, log_sums, row_weights, gradient);
}

}  // namespace sfron
