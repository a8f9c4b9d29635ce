#include "adaptive_cross_entropy/adaptive_cross_entropy.h"

#include <algorithm>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/lanes.h"
#include "common/weights.h"

namespace sfron {
namespace {

// Sum of e^(x - shift); at most 64 additions per lane, then a tree: the same order on every processor. Computing takes
// as long as memory, so the next block is fetched meanwhile: it lies behind this one, as rows follow each other.
SFRON_HD float block_sum(const float* x, int64_t n, float shift, const char* next, int64_t bytes) {  // x [n]
  alignas(64) float lane[kLanes] = {};
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    prefetch_lines(next + i * bytes);
    for (int64_t j = 0; j < kLanes; ++j) lane[j] += exp_below_88(x[i + j] - shift);
  }
  if (n % kLanes != 0) {
    const Edge edge(x, n, -INFINITY);
    for (int64_t j = 0; j < kLanes; ++j) lane[j] += exp_below_88(edge.values[j] - shift);
  }
  return fold_lanes(lane, [](float a, float b) { return a + b; });
}

// out = weight * softmax, x and out [n].
SFRON_HD void block_backward(const float* x, int64_t n, float lse, float weight, float* out) {
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    prefetch_lines(x + i + kAhead);
    SFRON_INDEPENDENT
    for (int64_t j = 0; j < kLanes; ++j) out[i + j] = cross_entropy_backward_one(x[i + j], lse, 0.0f, weight);
  }
  if (n % kLanes != 0) {
    Edge edge(x, n, lse);
    for (int64_t j = 0; j < kLanes; ++j) {
      edge.values[j] = cross_entropy_backward_one(edge.values[j], lse, 0.0f, weight);
    }
    for (int64_t rest = n % kLanes, j = 0; j < rest; ++j) out[n - rest + j] = edge.values[kLanes - rest + j];
  }
}

// log-sum-exp of a row, in double.
SFRON_HD double row_forward(const CrossEntropyRows& t, int64_t row, float* scratch) {
  float maximum = -INFINITY;
  double sum = 0.0;
  for (int64_t at = 0; at < t.classes; at += kRowBlock) {
    const int64_t n = std::min(kRowBlock, t.classes - at);
    const float* x = load_tile(t.logits, t.dtype, row * t.classes + at, n, scratch);  // [n]
    const float largest = block_maximum(x, n);
    if (largest > maximum) {  // what was summed so far was relative to the old maximum
      if (sum != 0.0) sum *= exp_one(row_shift(maximum) - row_shift(largest));
      maximum = largest;
    }
    if (maximum == INFINITY) {  // only a NaN matters now
      sum = std::any_of(x, x + n, [](float value) { return value != value; }) ? NAN : std::max(sum, 1.0);
      continue;
    }
    const int64_t bytes = dtype_bytes(t.dtype);
    const char* next = static_cast<const char*>(t.logits) + (row * t.classes + at + n) * bytes;
    sum += block_sum(x, n, row_shift(maximum), next, bytes);
  }
  return row_log_sum(maximum, sum);
}

// The gradient may be the logits' own memory.
SFRON_HD void row_backward(
    const CrossEntropyRows& t, int64_t row, float lse, float weight, void* gradient, float* scratch, float* result) {
  const int64_t label = t.labels[row], start = row * t.classes;
  const bool counted = label != t.ignore_index;
  const float picked = counted ? load_one(t.logits, t.dtype, start + label) : 0.0f;  // before it may be overwritten
  for (int64_t at = 0; at < t.classes; at += kRowBlock) {
    const int64_t n = std::min(kRowBlock, t.classes - at);
    if (!counted) {
      zero_tile(gradient, t.dtype, start + at, n);
      continue;
    }
    const float* x = load_tile(t.logits, t.dtype, start + at, n, scratch);  // [n]
    float* out = open_tile(gradient, t.dtype, start + at, result);          // [n]
    block_backward(x, n, lse, weight, out);
    if (label >= at && label < at + n) out[label - at] = cross_entropy_backward_one(picked, lse, 1.0f, weight);
    store_tile(gradient, t.dtype, start + at, n, out);
  }
}

struct ForwardKernel {
  void operator()(const CrossEntropyRows& t, int64_t begin, int64_t end, float* lse, double* losses) const {
    alignas(64) float scratch[kRowBlock];
    for (int64_t row = begin; row < end; ++row) {
      const double exact = row_forward(t, row, scratch);
      lse[row] = static_cast<float>(exact);
      const int64_t label = t.labels[row];
      losses[row] = label == t.ignore_index ? 0.0 : exact - load_one(t.logits, t.dtype, row * t.classes + label);
    }
  }
};

struct BackwardKernel {
  void operator()(
      const CrossEntropyRows& t, int64_t begin, int64_t end, const float* lse, const float* row_weights,
      void* gradient) const {
    alignas(64) float scratch[kRowBlock], result[kRowBlock];
    for (int64_t row = begin; row < end; ++row) {
      row_backward(t, row, lse[row], row_weights[row], gradient, scratch, result);
    }
  }
};

struct SumKernel {
  void operator()(
      const CrossEntropyRows& t, int64_t begin, int64_t end, const RawWeight& rule, void* gradient, float* losses,
      double* raw) const {
    alignas(64) float scratch[kRowBlock], result[kRowBlock];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t label = t.labels[row];
      const bool counted = label != t.ignore_index;
      const double exact = counted ? row_forward(t, row, scratch) : 0.0;
      losses[row] = 0.0f, raw[row] = 0.0;
      if (counted) {
        losses[row] = static_cast<float>(exact - load_one(t.logits, t.dtype, row * t.classes + label));
        raw[row] = raw_weight(losses[row], rule.temperature, rule.floor);
      }
      const float weight = static_cast<float>(raw[row] * rule.scale);
      row_backward(t, row, static_cast<float>(exact), weight, gradient, scratch, result);
    }
  }
};

struct ScaleKernel {
  void operator()(void* values, DType dtype, int64_t begin, int64_t end, float factor) const {
    alignas(64) float scratch[kRowBlock];
    for (int64_t at = begin; at < end; at += kRowBlock) {
      const int64_t n = std::min(kRowBlock, end - at);
      float* x = load_tile(values, dtype, at, n, scratch);  // [n]
      each_lane(n, nullptr, [=](int64_t i) { prefetch(i, x); }, [=](int64_t i, bool) { x[i] *= factor; });
      store_tile(values, dtype, at, n, x);
    }
  }
};

}  // namespace

void adaptive_cross_entropy_cpu(const CrossEntropyRows& t, int64_t begin, int64_t end, float* lse, double* losses) {
  run_isa(ForwardKernel{}, t, begin, end, lse, losses);
}

void adaptive_cross_entropy_backward_cpu(
    const CrossEntropyRows& t, int64_t begin, int64_t end, const float* lse, const float* row_weights, void* gradient) {
  run_isa(BackwardKernel{}, t, begin, end, lse, row_weights, gradient);
}

void adaptive_cross_entropy_sum_cpu(
    const CrossEntropyRows& t, int64_t begin, int64_t end, const RawWeight& rule, void* gradient, float* losses,
    double* raw) {
  run_isa(SumKernel{}, t, begin, end, rule, gradient, losses, raw);
}

void scale_cpu(void* values, DType dtype, int64_t begin, int64_t end, float factor) {
  run_isa(ScaleKernel{}, values, dtype, begin, end, factor);
}

}  // namespace sfron
