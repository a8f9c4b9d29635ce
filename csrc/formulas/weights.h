#pragma once
// From per-sample losses to the adaptive weights max(l, floor)^-lambda / sum
// (docs/equations.md, 4 and 5). Host, in double.
#include <cmath>
#include <cstdint>
#include <limits>

namespace sfron {

// The floor keeps a sample with a loss of exactly 0 from swallowing all weight; a NaN loss stays
// NaN. With a reference it is of the loss relative to that.
inline double weight_base(float loss, double floor, float reference = 1.0f) {
  const double relative = static_cast<double>(loss) / static_cast<double>(reference);
  return relative < floor ? floor : relative;
}

// The least of bases [samples], in units of which no power overflows and the largest is 1; 0 marks
// a sample without a label. NaN if one is, 1 if there is no base.
inline double least_base(int64_t samples, const double* bases) {
  const double none = std::numeric_limits<double>::infinity();
  double least = none;
  for (int64_t i = 0; i < samples; ++i) {
    if (bases[i] != bases[i]) return bases[i];
    if (bases[i] != 0.0 && bases[i] < least) least = bases[i];
  }
  return least == none ? 1.0 : least;
}

inline double raw_weight(double base, double unit, double temperature) {
  return base == 0.0 ? 0.0 : std::pow(base / unit, -temperature);
}

struct WeightedLoss {
  float loss;
  double normaliser;  // sum of the raw weights
};

// losses, raw, weights [samples], factor(i) on the weight; adds in order, so threads cannot change
// the bits. Without a label a weight is 0, never 0 / 0.
template <class Factor>
WeightedLoss weighted_loss(int64_t samples, const float* losses, const double* raw, float* weights,
                           Factor factor) {
  double normaliser = 0.0, loss = 0.0;
  for (int64_t i = 0; i < samples; ++i) normaliser += raw[i];
  for (int64_t i = 0; i < samples; ++i) {
    weights[i] = static_cast<float>(raw[i] == 0.0 ? 0.0 : factor(i, raw[i] / normaliser));
    loss += static_cast<double>(weights[i]) * static_cast<double>(losses[i]);
  }
  return {static_cast<float>(loss), normaliser};
}

inline WeightedLoss weighted_loss(int64_t samples, const float* losses, const double* raw,
                                  float* weights) {
  return weighted_loss(samples, losses, raw, weights,
                       [](int64_t, double weight) { return weight; });
}

// Of losses relative to ``reference`` [samples]; from the cap on they weigh 0.
inline WeightedLoss relative_weighted_loss(int64_t samples, const float* losses, const double* raw,
                                           const double* bases, const float* reference, double cap,
                                           float* weights) {
  return weighted_loss(samples, losses, raw, weights, [=](int64_t i, double weight) {
    return bases[i] >= cap ? 0.0 : weight / static_cast<double>(reference[i]);
  });
}

}  // namespace sfron
