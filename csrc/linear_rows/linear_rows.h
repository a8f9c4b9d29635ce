#pragma once
// Row arithmetic of a tile of a head's logits: the log-sums of its rows, and what becomes of it in
// the backward pass. sfron_fast/ops/linear_rows.py says what is computed.
#include "formulas/scalar.h"
#include "formulas/softmax.h"

namespace sfron {

// factor * e^(logit - shift); e^inf where the logit is infinite and so the shift 0
SFRON_HD float linear_gradient_one(float logit, float shift, float factor) {
  return exp_or_inf(logit - shift) * factor;
}

// d softcap tanh(z / softcap) / d z = 1 - tanh^2, of the capped logit
SFRON_HD float cap_slope(float logit, float softcap) {
  const float tanh = logit / softcap;
  return (1.0f - tanh) * (1.0f + tanh);
}

struct LogitTile {
  const float* values;     // [rows, columns]
  const int64_t* labels;   // [rows], of which any may lie in another tile
  int64_t start, columns;  // classes [start, start + columns)
};

inline int64_t label_column(const LogitTile& t, int64_t row) {  // -1: not in this tile
  const int64_t label = t.labels[row];
  return label >= t.start && label - t.start < t.columns ? label - t.start : -1;
}

// Adds the tile to what is known of the rows [begin, end): maximum, others, picked [rows].
void linear_log_sums_cpu(const LogitTile& t, int64_t begin, int64_t end, float* maximum,
                         float* others, float* picked);

struct TileGradient {
  const float *shift, *factor, *label;  // [rows]; `label` is the gradient there
  float softcap;                        // 0: none
  void* out;                            // [rows, columns], perhaps the logits' memory
  DType dtype;                          // of `out`
};

// Rows [begin, end) of the gradient.
void linear_gradient_cpu(const LogitTile& t, const TileGradient& g, int64_t begin, int64_t end);

}  // namespace sfron
