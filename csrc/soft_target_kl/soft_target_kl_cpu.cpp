#include "soft_target_kl/soft_target_kl.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/row_blocks.h"
#include "cpu/tiles.h"
#include "soft_target_kl/narrow_kl.h"

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
