#include "adaptive_cross_entropy/adaptive_cross_entropy.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/row_blocks.h"
#include "cpu/tiles.h"
#include "formulas/weights.h"

namespace sfron {
namespace {

// out = weighted softmax of x, both [n].
SFRON_HD void block_backward(const float* x, int64_t n, Softmax softmax, float* out) {
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    prefetch_lines(x + i + kAhead);
    SFRON_INDEPENDENT
    for (int64_t j = 0; j < kLanes; ++j) out[i + j] = cross_entropy_backward_one(x[i + j], softmax);
  }
  if (n % kLanes != 0) {
    Edge edge(x, n, softmax.base);
    for (int64_t j = 0; j < kLanes; ++j)
      edge.values[j] = cross_entropy_backward_one(edge.values[j], softmax);
    for (int64_t rest = n % kLanes, j = 0; j < rest; ++j)
      out[n - rest + j] = edge.values[kLanes - rest + j];
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

struct ForwardKernel {
  void operator()(const CrossEntropyRows& t, int64_t begin, int64_t end, int64_t rows,
                  float* log_sums, double* losses) const {
    alignas(64) float scratch[kRowBlock];
    for (int64_t row = begin; row < end; ++row) {
      const bool counted = t.labels[row] != t.ignore_index;
      const float picked = picked_logit(t, row);
      const LogSum sum = row_forward(t, row, counted ? t.labels[row] : 0, picked, scratch);
      log_sums[row] = sum.shift;
      log_sums[rows + row] = static_cast<float>(sum.log_sum);
      losses[row] = counted ? cross_entropy_loss(sum, picked) : 0.0;
    }
  }
};

struct BackwardKernel {
  void operator()(const CrossEntropyRows& t, int64_t begin, int64_t end, int64_t rows,
                  const float* log_sums, const float* row_weights, void* gradient) const {
    alignas(64) float scratch[kRowBlock], result[kRowBlock];
    for (int64_t row = begin; row < end; ++row) {
      const LogSum sum{log_sums[row], log_sums[rows + row]};
      row_backward(t, row, picked_logit(t, row), sum, row_weights[row], gradient, scratch, result);
    }
  }
};

struct SumKernel {
  void operator()(const CrossEntropyRows& t, int64_t begin, int64_t end, const RawWeight& rule,
                  void* gradient, float* losses, double* raw) const {
    alignas(64) float scratch[kRowBlock], result[kRowBlock];
    for (int64_t row = begin; row < end; ++row) {
      LogSum sum{0.0f, 0.0};
      const float picked = picked_logit(t, row);
      losses[row] = 0.0f, raw[row] = 0.0;
      if (t.labels[row] != t.ignore_index) {
        sum = row_forward(t, row, t.labels[row], picked, scratch);
        losses[row] = static_cast<float>(cross_entropy_loss(sum, picked));
        raw[row] = raw_weight(weight_base(losses[row], rule.floor), 1.0, rule.temperature);
        // as it is stored between two passes: the same bits as theirs
        sum.log_sum = static_cast<float>(sum.log_sum);
      }
      row_backward(t, row, picked, sum, static_cast<float>(raw[row] * rule.scale), gradient,
                   scratch, result);
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
