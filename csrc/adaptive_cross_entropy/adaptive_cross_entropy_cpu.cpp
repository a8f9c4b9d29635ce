#include "adaptive_cross_entropy/adaptive_cross_entropy.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/narrow_rows.h"
#include "cpu/row_blocks.h"
#include "cpu/tiles.h"
#include "formulas/weights.h"

namespace sfron {
namespace {

// out = weighted softmax of x, both [n], perhaps the same memory. The last lanes end where x ends:
// some are computed twice, from what was there before.
SFRON_HD void block_backward(const float* x, int64_t n, Softmax softmax, float* out) {
  const int64_t last = std::min(n, kLanes);
  alignas(64) float lanes[kLanes] = {};
  if (n % kLanes != 0) std::copy_n(x + n - last, last, lanes);
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    prefetch_lines(x + i + kAhead);
    SFRON_INDEPENDENT
    for (int64_t j = 0; j < kLanes; ++j) out[i + j] = cross_entropy_backward_one(x[i + j], softmax);
  }
  if (n % kLanes == 0) return;
  for (int64_t j = 0; j < kLanes; ++j) lanes[j] = cross_entropy_backward_one(lanes[j], softmax);
  if (n < kLanes) {
    std::copy_n(lanes, n, out);
  } else {
    for (int64_t j = 0; j < kLanes; ++j) out[n - kLanes + j] = lanes[j];
  }
}

// The label's class is added last: where it is the maximum, its e^0 would swallow the digits of the
// others' small sum, which is what the loss of a remembered sample consists of.
SFRON_HD LogSum row_forward(const CrossEntropyRows& t, int64_t row, int64_t label, float picked,
                            float* scratch) {
  RowSum sum;
  for (int64_t at = 0; at < t.classes; at += kRowBlock) {
    const int64_t n = std::min(kRowBlock, t.classes - at);
    const float* x = load_tile(t.logits, t.dtype, row * t.classes + at, n, scratch);  // [n]
    const int64_t bytes = dtype_bytes(t.dtype);
    const char* next = static_cast<const char*>(t.logits) + (row * t.classes + at + n) * bytes;
    add_block(sum, x, n, label - at, next, bytes);
  }
  const float shift = row_shift(sum.maximum);
  if (picked == shift && shift == sum.maximum)
    return {shift, std::log1p(sum.others)};  // as log loses what is small beside 1
  return {shift, row_log(sum.maximum, sum.others + exp_one(picked - shift))};
}

// The gradient may be the logits' own memory.
SFRON_HD void row_backward(const CrossEntropyRows& t, int64_t row, float picked, LogSum sum,
                           float weight, void* gradient, float* scratch, float* result) {
  const int64_t label = t.labels[row], start = row * t.classes;
  if (label == t.ignore_index) return zero_tile(gradient, t.dtype, start, t.classes);
  const Softmax softmax = weighted_softmax(sum, weight);
  for (int64_t at = 0; at < t.classes; at += kRowBlock) {
    const int64_t n = std::min(kRowBlock, t.classes - at);
    const float* x = load_tile(t.logits, t.dtype, start + at, n, scratch);  // [n]
    float* out = open_tile(gradient, t.dtype, start + at, result);          // [n]
    block_backward(x, n, softmax, out);
    if (label >= at && label < at + n)
      out[label - at] = cross_entropy_backward_label(sum, picked, weight);
    store_tile(gradient, t.dtype, start + at, n, out);
  }
}

// The label's logit, or the first class's where there is no label; read before it may be
// overwritten.
SFRON_HD float picked_logit(const CrossEntropyRows& t, int64_t row) {
  const int64_t label = t.labels[row];
  return load_one(t.logits, t.dtype, row * t.classes + (label == t.ignore_index ? 0 : label));
}

// Up to 32 rows: where each has its label and that one's logit, and what becomes of them.
struct Rows {
  alignas(64) int32_t label[kLanes];  // the first class where it is ignored
  alignas(64) Lane picked, shift;
  alignas(64) double log_sum[kLanes];
  bool counted[kLanes];

  SFRON_HD Rows(const CrossEntropyRows& t, int64_t row, int64_t rows) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const int64_t at = row + std::min(j, rows - 1);  // the last one again in lanes without a row
      counted[j] = t.labels[at] != t.ignore_index;
      label[j] = counted[j] ? static_cast<int32_t>(t.labels[at]) : 0;
      picked[j] = picked_logit(t, at);
    }
  }

  SFRON_HD LogSum sum(int64_t j) const { return {shift[j], log_sum[j]}; }
};

// Of up to 64 classes; an infinite maximum and a NaN are left to row_forward.
SFRON_HD void narrow_forward(const CrossEntropyRows& t, int64_t row, int64_t rows, Columns& x,
                             Rows& r) {
  load_columns(t.logits, t.dtype, row, rows, t.classes, x);
  column_maximum(x, t.classes, r.shift);
  alignas(64) Lane others = {};
  for (int32_t c = 0; c < t.classes; ++c) {
    SFRON_INDEPENDENT
    for (int64_t j = 0; j < kLanes; ++j) {
      const uint32_t other = bits_if(r.label[j] != c);
      others[j] += choose(other, exp_below_88(x.of[c][j] - r.shift[j]), 0.0f);
    }
  }
  SFRON_INDEPENDENT
  for (int64_t j = 0; j < kLanes; ++j)
    r.log_sum[j] = log_of_both(exp_below_88(r.picked[j] - r.shift[j]), others[j]);
  for (int64_t j = 0; j < rows; ++j) {
    if (fabsf(r.shift[j]) < INFINITY && others[j] < INFINITY && r.picked[j] == r.picked[j])
      continue;
    const LogSum sum = row_forward(t, row + j, r.label[j], r.picked[j], x.tile);
    r.shift[j] = sum.shift, r.log_sum[j] = sum.log_sum;
  }
}

// What narrow_backward works in: the elements' softmaxes, and tiles for other dtypes.
struct Narrow {
  Repeated base, factor;
  alignas(64) float x[kNarrow * kLanes], out[kNarrow * kLanes];
};

// weights [rows]; the gradient may be the logits' own memory.
SFRON_HD void narrow_backward(const CrossEntropyRows& t, int64_t row, int64_t rows, const Rows& r,
                              const float* weights, Narrow& narrow, void* gradient) {
  const int64_t n = rows * t.classes, at = row * t.classes;
  alignas(64) Lane base, factor, label;
  SFRON_INDEPENDENT
  for (int64_t j = 0; j < rows; ++j) {
    const Softmax softmax = weighted_softmax(r.sum(j), weights[j]);
    base[j] = softmax.base, factor[j] = softmax.factor;
    label[j] = cross_entropy_backward_label(r.sum(j), r.picked[j], weights[j]);
  }
  narrow.base.fill(base, rows, t.classes), narrow.factor.fill(factor, rows, t.classes);
  const float* x = load_tile(t.logits, t.dtype, at, n, narrow.x);  // [n]
  float* out = open_tile(gradient, t.dtype, at, narrow.out);       // [n]
  SFRON_INDEPENDENT
  for (int64_t i = 0; i < n; ++i)
    out[i] = cross_entropy_backward_one(x[i], {narrow.base.of[i], narrow.factor.of[i]});
  for (int64_t j = 0; j < rows; ++j) out[j * t.classes + r.label[j]] = label[j];
  store_tile(gradient, t.dtype, at, n, out);
  for (int64_t j = 0; j < rows; ++j) {
    if (!r.counted[j]) zero_tile(gradient, t.dtype, (row + j) * t.classes, t.classes);
  }
}

struct ForwardKernel {
  void operator()(const CrossEntropyRows& t, int64_t begin, int64_t end, int64_t rows,
                  float* log_sums, double* losses) const {
    const auto keep = [=](int64_t row, bool counted, LogSum sum, float picked) {
      log_sums[row] = sum.shift;
      log_sums[rows + row] = static_cast<float>(sum.log_sum);
      losses[row] = counted ? cross_entropy_loss(sum, picked) : 0.0;
    };
    Columns columns;
    for (int64_t row = begin; t.classes <= kNarrow && row < end; row += kLanes) {
      const int64_t some = std::min(kLanes, end - row);
      Rows r(t, row, some);
      narrow_forward(t, row, some, columns, r);
      for (int64_t j = 0; j < some; ++j) keep(row + j, r.counted[j], r.sum(j), r.picked[j]);
    }
    alignas(64) float scratch[kRowBlock];
    for (int64_t row = begin; t.classes > kNarrow && row < end; ++row) {
      const bool counted = t.labels[row] != t.ignore_index;
      const float picked = picked_logit(t, row);
      keep(row, counted, row_forward(t, row, counted ? t.labels[row] : 0, picked, scratch), picked);
    }
  }
};

struct BackwardKernel {
  void operator()(const CrossEntropyRows& t, int64_t begin, int64_t end, int64_t rows,
                  const float* log_sums, const float* row_weights, void* gradient) const {
    Narrow narrow;
    for (int64_t row = begin; t.classes <= kNarrow && row < end; row += kLanes) {
      const int64_t some = std::min(kLanes, end - row);
      Rows r(t, row, some);
      std::copy_n(log_sums + row, some, r.shift);
      std::copy_n(log_sums + rows + row, some, r.log_sum);
      narrow_backward(t, row, some, r, row_weights + row, narrow, gradient);
    }
    alignas(64) float scratch[kRowBlock], result[kRowBlock];
    for (int64_t row = begin; t.classes > kNarrow && row < end; ++row) {
      const LogSum sum{log_sums[row], log_sums[rows + row]};
      row_backward(t, row, picked_logit(t, row), sum, row_weights[row], gradient, scratch, result);
    }
  }
};

struct SumKernel {
  void operator()(const CrossEntropyRows& t, int64_t begin, int64_t end, const RawWeight& rule,
                  void* gradient, float* losses, double* raw) const {
    // loss and raw weight of a row; its weight in the gradient
    const auto keep = [=](int64_t row, bool counted, LogSum sum, float picked) {
      losses[row] = counted ? static_cast<float>(cross_entropy_loss(sum, picked)) : 0.0f;
      raw[row] =
          counted ? raw_weight(weight_base(losses[row], rule.floor), 1.0, rule.temperature) : 0.0;
      return static_cast<float>(raw[row] * rule.scale);
    };
    Columns columns;
    Narrow narrow;
    for (int64_t row = begin; t.classes <= kNarrow && row < end; row += kLanes) {
      const int64_t some = std::min(kLanes, end - row);
      Rows r(t, row, some);
      narrow_forward(t, row, some, columns, r);
      Lane weights;
      for (int64_t j = 0; j < some; ++j) {
        weights[j] = keep(row + j, r.counted[j], r.sum(j), r.picked[j]);
        r.log_sum[j] = static_cast<float>(r.log_sum[j]);  // as it is stored between two passes
      }
      narrow_backward(t, row, some, r, weights, narrow, gradient);
    }
    alignas(64) float scratch[kRowBlock], result[kRowBlock];
    for (int64_t row = begin; t.classes > kNarrow && row < end; ++row) {
      const bool counted = t.labels[row] != t.ignore_index;
      const float picked = picked_logit(t, row);
      LogSum sum{0.0f, 0.0};
      if (counted) sum = row_forward(t, row, t.labels[row], picked, scratch);
      const float weight = keep(row, counted, sum, picked);
      sum.log_sum = static_cast<float>(sum.log_sum);  // the same bits as theirs
      row_backward(t, row, picked, sum, weight, gradient, scratch, result);
    }
  }
};

struct ScaleKernel {
  void operator()(void* values, DType dtype, int64_t begin, int64_t end, float factor) const {
    alignas(64) float scratch[kRowBlock];
    for (int64_t at = begin; at < end; at += kRowBlock) {
      const int64_t n = std::min(kRowBlock, end - at);
      float* x = load_tile(values, dtype, at, n, scratch);  // [n]
      each_lane(
          n, nullptr, [=](int64_t i) { prefetch(i, x); }, [=](int64_t i, bool) { x[i] *= factor; });
      store_tile(values, dtype, at, n, x);
    }
  }
};

}  // namespace

void adaptive_cross_entropy_cpu(const CrossEntropyRows& t, int64_t begin, int64_t end, int64_t rows,
                                float* log_sums, double* losses) {
  run_isa(ForwardKernel{}, t, begin, end, rows, log_sums, losses);
}

void adaptive_cross_entropy_backward_cpu(const CrossEntropyRows& t, int64_t begin, int64_t end,
                                         int64_t rows, const float* log_sums,
                                         const float* row_weights, void* gradient) {
  run_isa(BackwardKernel{}, t, begin, end, rows, log_sums, row_weights, gradient);
}

void adaptive_cross_entropy_sum_cpu(const CrossEntropyRows& t, int64_t begin, int64_t end,
                                    const RawWeight& rule, void* gradient, float* losses,
                                    double* raw) {
  run_isa(SumKernel{}, t, begin, end, rule, gradient, losses, raw);
}

void scale_cpu(void* values, DType dtype, int64_t begin, int64_t end, float factor) {
  run_isa(ScaleKernel{}, values, dtype, begin, end, factor);
}

}  // namespace sfron
