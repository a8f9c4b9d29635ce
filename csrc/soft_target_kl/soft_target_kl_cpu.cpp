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
  double cross;  // of k e^(teacher - m) ((teacher - m) - (logit - m)), k the class's weight
  double mass;   // of k e^(teacher - m), only with class weights
};

struct Maxima {
  float logits, teacher;
};

// y [n] with what its classes are tilted by.
SFRON_HD const float* tilted(const float* y, const float* tilt, int64_t n, float* scratch) {
  SFRON_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) scratch[i] = y[i] + tilt[i];
  return scratch;
}

// At most 64 additions per lane, then a tree: the same order on every processor. The next block is
// fetched meanwhile.
template <bool kWeighted>
SFRON_HD Sums block_sums(const float* x, const float* y, const float* k, int64_t n, Maxima shift,
                         float inverse_temperature, const char* next_x, const char* next_y,
                         int64_t bytes) {  // x, y, k [n]: logits, teacher, class weights
  alignas(64) float logits[kLanes] = {}, teacher[kLanes] = {}, cross[kLanes] = {};
  [[maybe_unused]] alignas(64) float mass[kLanes] = {};
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    prefetch_lines(next_x + i * bytes);
    prefetch_lines(next_y + i * bytes);
    for (int64_t j = 0; j < kLanes; ++j) {
      const float a = (y[i + j] - shift.teacher) * inverse_temperature;
      const float b = (x[i + j] - shift.logits) * inverse_temperature, power = exp_one(a);
      const float part = kWeighted ? k[i + j] * power : power;
      teacher[j] += power;
      if constexpr (kWeighted) mass[j] += part;
      cross[j] += kl_term_one(part, a, b);
      logits[j] += exp_one(b);
    }
  }
  if (n % kLanes != 0) {
    const Edge edge_x(x, n, -INFINITY), edge_y(y, n, -INFINITY);
    const Edge edge_k(kWeighted ? k : x, n, 0.0f);
    for (int64_t j = 0; j < kLanes; ++j) {
      const float a = (edge_y.values[j] - shift.teacher) * inverse_temperature;
      const float b = (edge_x.values[j] - shift.logits) * inverse_temperature, power = exp_one(a);
      const float part = kWeighted ? edge_k.values[j] * power : power;
      teacher[j] += power;
      if constexpr (kWeighted) mass[j] += part;
      cross[j] += kl_term_one(part, a, b);
      logits[j] += exp_one(b);
    }
  }
  const auto add = [](float a, float b) { return a + b; };
  return {fold_lanes(logits, add), fold_lanes(teacher, add), fold_lanes(cross, add),
          kWeighted ? static_cast<double>(fold_lanes(mass, add)) : 0.0};
}

// Sums so far, now relative to larger maxima.
template <bool kWeighted>
SFRON_HD void rescale(Sums& sums, Maxima old, Maxima now, float inverse_temperature) {
  const float by_teacher = (row_shift(old.teacher) - row_shift(now.teacher)) * inverse_temperature;
  const float by_logits = (row_shift(old.logits) - row_shift(now.logits)) * inverse_temperature;
  if (sums.teacher != 0.0) {  // each difference in `cross` changes by as much
    sums.cross +=
        (kWeighted ? sums.mass : sums.teacher) * (static_cast<double>(by_teacher) - by_logits);
    sums.cross *= exp_one(by_teacher);
    if constexpr (kWeighted) sums.mass *= exp_one(by_teacher);
    sums.teacher *= exp_one(by_teacher);
  }
  if (sums.logits != 0.0) sums.logits *= exp_one(by_logits);
}

template <bool kWeighted>
SFRON_HD void row_forward(const KlRows& t, int64_t row, float* scratch_x, float* scratch_y,
                          float* losses, float* log_sums) {
  const float inverse_temperature = static_cast<float>(1.0 / t.temperature);
  const int64_t bytes = dtype_bytes(t.dtype);
  Maxima maxima{-INFINITY, -INFINITY};
  Sums sums{0.0, 0.0, 0.0, 0.0};
  for (int64_t at = 0; at < t.classes; at += kRowBlock) {
    const int64_t n = std::min(kRowBlock, t.classes - at), start = row * t.classes + at;
    const float* x = load_tile(t.logits, t.dtype, start, n, scratch_x);   // [n]
    const float* y = load_tile(t.teacher, t.dtype, start, n, scratch_y);  // [n]
    if (t.tilt != nullptr) y = tilted(y, t.tilt + at, n, scratch_y);
    const Maxima now{std::max(maxima.logits, block_maximum(x, n)),
                     std::max(maxima.teacher, block_maximum(y, n))};
    if (at > 0) rescale<kWeighted>(sums, maxima, now, inverse_temperature);
    maxima = now;
    const Maxima shift{row_shift(now.logits), row_shift(now.teacher)};
    const char* next_x = static_cast<const char*>(t.logits) + (start + n) * bytes;
    const char* next_y = static_cast<const char*>(t.teacher) + (start + n) * bytes;
    const float* k = kWeighted ? t.class_weights + at : nullptr;
    const Sums more =
        block_sums<kWeighted>(x, y, k, n, shift, inverse_temperature, next_x, next_y, bytes);
    sums.logits += more.logits, sums.teacher += more.teacher, sums.cross += more.cross;
    if constexpr (kWeighted) sums.mass += more.mass;
  }
  const double logits = row_log(maxima.logits, sums.logits),
               teacher = row_log(maxima.teacher, sums.teacher);
  double kl = sums.cross / sums.teacher;
  if constexpr (kWeighted) {
    const double mass = sums.mass / sums.teacher;
    if (mass != 0.0) kl += mass * (logits - teacher);  // 0 times inf is NaN
    log_sums[4 * t.samples + row] = static_cast<float>(mass);
  } else {
    kl = kl - teacher + logits;
  }
  losses[row] = static_cast<float>(kl * t.temperature * t.temperature);
  log_sums[row] = row_shift(maxima.logits), log_sums[t.samples + row] = static_cast<float>(logits);
  log_sums[2 * t.samples + row] = row_shift(maxima.teacher),
                           log_sums[3 * t.samples + row] = static_cast<float>(teacher);
}

// The softmaxes of a row, with its weight; q also with the sum of k p.
template <bool kWeighted>
SFRON_HD void row_softmaxes(const KlRows& t, const float* sums, float row_weight, Softmax& q,
                            Softmax& p) {  // sums: the row's first of log_sums [5, samples]
  const int64_t n = t.samples;
  const float mass = kWeighted ? sums[4 * n] : 1.0f;
  q = weighted_softmax({sums[0], sums[n]}, kWeighted ? row_weight * mass : row_weight);
  p = weighted_softmax({sums[2 * n], sums[3 * n]}, row_weight);
}

// x, y, k, out [n]: logits, teacher, class weights, gradient, in memory of its own. The last lanes
// end where x ends: some are computed twice.
template <bool kWeighted>
SFRON_HD void block_backward(const float* x, const float* y, const float* k, int64_t n,
                             float inverse_temperature, Softmax q, Softmax p, float* out) {
  const auto weighted = [&](float weight) { return Softmax{p.base, p.factor * weight}; };
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t at = std::min(i, n - kLanes);
    if (at < 0) break;
    prefetch_lines(x + i + kAhead);
    prefetch_lines(y + i + kAhead);
    SFRON_INDEPENDENT
    for (int64_t j = 0; j < kLanes; ++j)
      out[at + j] = kl_backward_one(x[at + j], y[at + j], inverse_temperature, q,
                                    kWeighted ? weighted(k[at + j]) : p);
  }
  if (n >= kLanes) return;
  Edge edge_x(x, n, 0.0f);
  const Edge edge_y(y, n, 0.0f), edge_k(kWeighted ? k : x, n, 0.0f);
  for (int64_t j = 0; j < kLanes; ++j) {
    edge_x.values[j] = kl_backward_one(edge_x.values[j], edge_y.values[j], inverse_temperature, q,
                                       kWeighted ? weighted(edge_k.values[j]) : p);
  }
  std::copy_n(edge_x.values + kLanes - n, n, out);
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

template <bool kWeighted>
struct ForwardKernel {
  void operator()(const KlRows& t, int64_t begin, int64_t end, float* losses,
                  float* log_sums) const {
    if (t.classes > kNarrow) return wide(t, begin, end, losses, log_sums);
    Columns x, y;
    bool plain[kLanes];
    for (int64_t row = begin; row < end; row += kLanes) {
      const int64_t rows = std::min(kLanes, end - row);
      narrow_forward<kWeighted>(t, row, rows, x, y, losses, log_sums, plain);
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
      for (int64_t i = 0; i < (kWeighted ? 5 : 4); ++i) log_sums[i * t.samples + row] = 0.0f;
      if (kl_counted(t, row))
        row_forward<kWeighted>(t, row, scratch_x, scratch_y, losses, log_sums);
    }
  }
};

template <bool kWeighted>
struct BackwardKernel {
  void operator()(const KlRows& t, int64_t begin, int64_t end, const float* log_sums,
                  const float* row_weights, void* gradient) const {
    alignas(64) float scratch_x[kRowBlock], scratch_y[kRowBlock], result[kRowBlock];
    const float inverse_temperature = static_cast<float>(1.0 / t.temperature);
    Narrow narrow;
    for (int64_t row = begin; t.classes <= kNarrow && row < end; row += kLanes)
      narrow_backward<kWeighted>(t, row, std::min(kLanes, end - row), log_sums, row_weights, narrow,
                                 gradient);
    for (int64_t row = begin; t.classes > kNarrow && row < end; ++row) {
      if (!kl_counted(t, row)) {
        zero_tile(gradient, t.dtype, row * t.classes, t.classes);
        continue;
      }
      Softmax q, p;
      row_softmaxes<kWeighted>(t, log_sums + row, row_weights[row], q, p);
      for (int64_t at = 0; at < t.classes; at += kRowBlock) {
        const int64_t n = std::min(kRowBlock, t.classes - at), start = row * t.classes + at;
        const float* x = load_tile(t.logits, t.dtype, start, n, scratch_x);   // [n]
        const float* y = load_tile(t.teacher, t.dtype, start, n, scratch_y);  // [n]
        if (t.tilt != nullptr) y = tilted(y, t.tilt + at, n, scratch_y);
        const float* k = kWeighted ? t.class_weights + at : nullptr;
        float* out = open_tile(gradient, t.dtype, start, result);  // [n]
        block_backward<kWeighted>(x, y, k, n, inverse_temperature, q, p, out);
        store_tile(gradient, t.dtype, start, n, out);
      }
    }
  }
};

}  // namespace

void soft_target_kl_cpu(const KlRows& t, int64_t begin, int64_t end, float* losses,
                        float* log_sums) {
  if (t.class_weights == nullptr) {
    run_isa(ForwardKernel<false>{}, t, begin, end, losses, log_sums);
  } else {
    run_isa(ForwardKernel<true>{}, t, begin, end, losses, log_sums);
  }
}

void soft_target_kl_backward_cpu(const KlRows& t, int64_t begin, int64_t end, const float* log_sums,
                                 const float* row_weights, void* gradient) {
  if (t.class_weights == nullptr) {
    run_isa(BackwardKernel<false>{}, t, begin, end, log_sums, row_weights, gradient);
  } else {
    run_isa(BackwardKernel<true>{}, t, begin, end, log_sums, row_weights, gradient);
  }
}

}  // namespace sfron
