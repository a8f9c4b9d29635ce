#pragma once
// What the row ops share: e^x, the log-sum of a row and its softmax.
#include <cmath>

#include "formulas/scalar.h"

namespace sfron {

// e^r - 1 for |r| <= ln 2 / 2: r + r^2 P(r), in operations that vectorise.
SFRON_HD float expm1_small(float r) {
  const float square = r * r;
  const float high = (0x1.6a23cep-10f * square) + (0x1.123a20p-7f * r + 0x1.5558f2p-5f);
  const float p = high * square + (0x1.555492p-3f * r +
                                   0x1.fffffcp-2f);  // least maximum error for (e^r - 1 - r) / r^2
  return p * square + r;
}

// e^x for x up to 88 with an error below 1 ulp (0.99 measured over [-87, 0]); 0 for x below -87. x
// = n ln 2 + r with |r| <= ln 2 / 2, e^x = 2^n e^r.
SFRON_HD float exp_below_88(float x) {
  // 1.5 * 2^23 + 127: adding it rounds to a whole number, whose low bits are n + 127
  const float magic = 12583039.0f;
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  // ln 2 in two parts, n * the first is exact
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  const float y = expm1_small(r) + 1.0f;
  const float result = y * float_of(bits_of(shifted) << 23);
  return x < -87.0f ? 0.0f : result;  // there the bits of 2^n have wrapped
}

SFRON_HD float exp_one(float x) {
  return exp_below_88(x > 88.0f ? 88.0f : x);
}  // a NaN passes

// as exp_one, but inf above 88
SFRON_HD float exp_or_inf(float x) {
  return x > 88.0f ? INFINITY : exp_below_88(x);
}

// e^x - 1 for x <= 0, also where that is small
SFRON_HD float expm1_negative(float x) {
  return x < -0.34f ? exp_below_88(x) - 1.0f : expm1_small(x);
}

// log-sum-exp subtracts the maximum, unless that is infinite: inf - inf is NaN.
SFRON_HD float row_shift(float maximum) {
  return fabsf(maximum) == INFINITY ? 0.0f : maximum;
}

// Its logarithm, relative to that shift: inf if there is an inf, unless there is a NaN.
inline double row_log(float maximum, double sum) {
  return maximum == INFINITY && sum == sum ? static_cast<double>(INFINITY) : std::log(sum);
}

// log(x) for finite x >= 1, in operations that vectorise: x = 2^k m with m around 1, and log m = 2
// atanh((m - 1) / (m + 1)) as its series, whose next term is below 1e-18 of the first.
SFRON_HD double log_above_1(double x) {
  uint64_t u;
  std::memcpy(&u, &x, 8);
  const uint64_t k = (u - 0x3fe6a09e667f3bcdu) >> 52;  // the bits of sqrt(1/2): m is in its [1, 2)
  const uint64_t mantissa = u - (k << 52), whole = 0x4330000000000000u | k;  // 2^52 + k
  double m, power;
  std::memcpy(&m, &mantissa, 8), std::memcpy(&power, &whole, 8);
  const double z = (m - 1.0) / (m + 1.0), w = z * z;
  double series = 1.0 / 21.0;
  series = series * w + 1.0 / 19.0, series = series * w + 1.0 / 17.0;
  series = series * w + 1.0 / 15.0, series = series * w + 1.0 / 13.0;
  series = series * w + 1.0 / 11.0, series = series * w + 1.0 / 9.0;
  series = series * w + 1.0 / 7.0, series = series * w + 1.0 / 5.0;
  series = series * w + 1.0 / 3.0;
  return (power - 0x1p52) * 0x1.62e42fefa39efp-1 + (z + z) * (series * w + 1.0);
}

// log(one + others) where one of the two is at least 1; keeps the digits of small `others`.
SFRON_HD double log_of_both(double one, double others) {
  const double sum = one + others;
  return log_above_1(sum) + (others - (sum - one)) / sum;
}

// log sum e^x = shift + log_sum. They stay apart, as their sum would lose the digits of a small
// log_sum.
struct LogSum {
  float shift;  // row_shift
  double log_sum;
};

// weight * softmax of x = factor * e^(x - base), which is 0 beside an infinite x.
struct Softmax {
  float base, factor;
};

SFRON_HD Softmax weighted_softmax(LogSum s, float weight) {
  const float log_sum = static_cast<float>(s.log_sum);
  return {fabsf(log_sum) == INFINITY ? log_sum : s.shift, weight * exp_one(-log_sum)};
}

}  // namespace sfron
