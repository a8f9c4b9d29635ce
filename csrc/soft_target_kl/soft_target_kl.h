#pragma once
// T^2 KL(softmax(teacher / T) || softmax(logits / T)) per row: the student of a teacher (Hinton et
// al. 2015). Losses and log-sums forward, row_weight * (softmax(logits / T) - softmax(teacher / T))
// backward. A class may be tilted for the teacher, and have a weight k: then the sum over classes
// is of k p log(p / q), and its derivative is sum(k p) q - k p.
#include "formulas/scalar.h"
#include "formulas/softmax.h"

namespace sfron {

struct KlRows {
  const void *logits, *teacher;  // [samples, classes]
  const float* weights;          // [samples] or null: all alike. Rows of weight 0 are not read.
  int64_t samples, classes;
  double temperature;
  DType dtype;                           // of both
  const float* tilt = nullptr;           // [classes] or null: added to the teacher's logits
  const float* class_weights = nullptr;  // [classes] or null: 1
};

SFRON_HD bool kl_counted(const KlRows& t, int64_t row) {
  return t.weights == nullptr || t.weights[row] != 0.0f;
}

// What a class adds to the sum over e^teacher (teacher - logit), both relative to their rows;
// `power` = e^teacher, times the class's weight. No probability for the teacher, or no weight:
// nothing, also where the logit is -inf, too.
SFRON_HD float kl_term_one(float power, float teacher, float logit) {
  return power == 0.0f ? 0.0f : power * (teacher - logit);
}

// softmaxes q of the logits and p of the teacher, over T, with the row's weight; and with class
// weights q with the sum of k p, p with the class's
SFRON_HD float kl_backward_one(float logit, float teacher, float inverse_temperature, Softmax q,
                               Softmax p) {
  return exp_below_88((logit - q.base) * inverse_temperature) * q.factor -
         exp_below_88((teacher - p.base) * inverse_temperature) * p.factor;
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

// Rows [begin, end) of losses [samples] and of log_sums [4, samples]: shift and log sum e^((x -
// shift) / T) of the logits, then of the teacher, apart as their sum would lose digits; with class
// weights a fifth, the sum of k p. All 0 where the weight is.
void soft_target_kl_cpu(const KlRows& t, int64_t begin, int64_t end, float* losses,
                        float* log_sums);

// Rows [begin, end) of the gradient [samples, classes]; row_weights [samples], log_sums [4 or
// 5, samples].
void soft_target_kl_backward_cpu(const KlRows& t, int64_t begin, int64_t end, const float* log_sums,
                                 const float* row_weights, void* gradient);

}  // namespace sfron
