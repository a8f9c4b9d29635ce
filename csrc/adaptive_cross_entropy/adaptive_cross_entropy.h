#pragma once
// Cross-entropy per row with the adaptive per-sample weight (README, equations 4 and 5): row losses and log-sum-exp forward,
// row_weight * (softmax - onehot) backward.
#include "common/hd.h"
#include "common/softmax.h"

namespace sfron {

SFRON_HD float cross_entropy_backward_one(float logit, float lse, float onehot, float row_weight) {
  return (exp_below_88(logit - lse) - onehot) * row_weight;
}

struct CrossEntropyRows {
  const void* logits;     // [rows, classes]
  const int64_t* labels;  // [rows], 0 to classes - 1 or ignored
  int64_t classes, ignore_index;
  DType dtype;
};

// Rows [begin, end): lse [rows] and losses [rows], the latter in double and 0 where the label is ignored.
void adaptive_cross_entropy_cpu(const CrossEntropyRows& t, int64_t begin, int64_t end, float* lse, double* losses);

// Rows [begin, end) of the gradient [rows, classes], the dtype of the logits and perhaps their memory; row_weights,
// lse [rows].
void adaptive_cross_entropy_backward_cpu(
    const CrossEntropyRows& t, int64_t begin, int64_t end, const float* lse, const float* row_weights, void* gradient);

struct RawWeight {
  double temperature, floor, scale;
};

// Both of one row after the other, while it is in the cache, where a row is a sample: losses and raw weights [rows], and
// the gradient of scale * sum of raw weight * loss, [rows, classes], in the logits' memory.
void adaptive_cross_entropy_sum_cpu(
    const CrossEntropyRows& t, int64_t begin, int64_t end, const RawWeight& rule, void* gradient, float* losses,
    double* raw);

// values [begin, end) *= factor
void scale_cpu(void* values, DType dtype, int64_t begin, int64_t end, float factor);

}  // namespace sfron
