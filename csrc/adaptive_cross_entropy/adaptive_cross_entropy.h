#pragma once
// Cross-entropy per row with the adaptive per-sample weight (README, equations 4 and 5): row losses and log-sum-exp forward,
// row_weight * (softmax - onehot) backward.
#include <cmath>
#include <cstring>

#include "common/hd.h"

namespace sfron {

// e^x with an error below 1 ulp (0.98 measured over [-87, 0]), in operations that vectorise. e^x below 2^-125 is 0, and
// no more than e^88; here x is at most about 0. x = n ln 2 + r with |r| <= ln 2 / 2, e^x = 2^n (1 + r + r^2 P(r)).
SFRON_HD float exp_one(float x) {
  const float limited = x > 88.0f ? 88.0f : x;  // a NaN passes
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
  const float shifted = limited * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (limited - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, n * the first is exact
  float p = 0x1.6a23cep-10f;  // least maximum error for (e^r - 1 - r) / r^2
  p = p * r + 0x1.123a20p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  const float y = (p * (r * r) + r) + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + (127u << 23);  // the bits of 2^n
  float power;
  std::memcpy(&power, &bits, 4);
  const float result = y * power;
  return x < -87.0f ? 0.0f : result;  // there the bits of 2^n have wrapped
}

// log-sum-exp subtracts the maximum, unless that is infinite: inf - inf is NaN.
SFRON_HD float row_shift(float maximum) { return fabsf(maximum) == INFINITY ? 0.0f : maximum; }

// log-sum-exp of a row from its maximum and the sum of e^(x - shift): inf if there is an inf, -inf if there is no
// other, NaN if there is one.
inline double row_log_sum(float maximum, double sum) {
  return maximum == INFINITY && sum == sum ? static_cast<double>(INFINITY) : row_shift(maximum) + std::log(sum);
}

SFRON_HD float cross_entropy_backward_one(float logit, float lse, float onehot, float row_weight) {
  return (exp_one(logit - lse) - onehot) * row_weight;
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
