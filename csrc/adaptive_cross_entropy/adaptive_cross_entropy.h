#pragma once
// Cross-entropy per row with the adaptive per-sample weight (docs/equations.md, 4 and 5): row
// losses and log-sums forward, row_weight * (softmax - onehot) backward.
#include "formulas/scalar.h"
#include "formulas/softmax.h"

namespace sfron {

// of a class that is not the label
SFRON_HD float cross_entropy_backward_one(float logit, Softmax s) {
  return exp_below_88(logit - s.base) * s.factor;
}

SFRON_HD double cross_entropy_loss(LogSum s, float picked) {
  return s.log_sum - (static_cast<double>(picked) - s.shift);
}

// softmax - 1 of the label, without the cancellation
SFRON_HD float cross_entropy_backward_label(LogSum s, float picked, float row_weight) {
  return expm1_negative(-static_cast<float>(cross_entropy_loss(s, picked))) * row_weight;
}

struct CrossEntropyRows {
  const void* logits;     // [rows, classes]
  const int64_t* labels;  // [rows], 0 to classes - 1 or ignored
  int64_t classes, ignore_index;
  DType dtype;
};

// Rows [begin, end): log_sums [2, rows] (shifts, then log_sums) and losses [rows], the latter in
// double and 0 where the label is ignored. `rows` = all of them.
void adaptive_cross_entropy_cpu(const CrossEntropyRows& t, int64_t begin, int64_t end, int64_t rows,
                                float* log_sums, double* losses);

// Rows [begin, end) of the gradient [rows, classes], the dtype of the logits and perhaps their
// memory; row_weights [rows], log_sums [2, rows].
void adaptive_cross_entropy_backward_cpu(const CrossEntropyRows& t, int64_t begin, int64_t end,
                                         int64_t rows, const float* log_sums,
                                         const float* row_weights, void* gradient);

struct RawWeight {
  double temperature, floor, scale;
};

// Both of one row after the other, while it is in the cache, where a row is a sample: losses and
// raw weights [rows], and the gradient of scale * sum of raw weight * loss, [rows, classes], in the
// logits' memory.
void adaptive_cross_entropy_sum_cpu(const CrossEntropyRows& t, int64_t begin, int64_t end,
                                    const RawWeight& rule, void* gradient, float* losses,
                                    double* raw);

// values [begin, end) *= factor
void scale_cpu(void* values, DType dtype, int64_t begin, int64_t end, float factor);

}  // namespace sfron
