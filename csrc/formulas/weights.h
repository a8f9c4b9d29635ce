#pragma once
// From per-sample losses to the adaptive weights max(l, floor)^-lambda / sum
// (docs/equations.md, 4 and 5). Host, in double.
#include <cmath>
#include <cstdint>
#include <limits>

namespace sfron {

// The floor keeps a sample with a loss of exactly 0 from swallowing all weight; a NaN loss stays
// NaN.
inline double weight_base(float loss, double floor) {
  return loss < floor ? floor : static_cast<double>(loss);
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

// losses, raw, weights [samples]; adds in order, so threads cannot change the bits. Without a label
// a weight is 0, never 0 / 0.
inline WeightedLoss weighted_loss(int64_t samples, const float* losses, const double* raw,
                                  float* weights) {
  double normaliser = 0.0, loss = 0.0;
  for (int64_t i = 0; i < samples; ++i) normaliser += raw[i];
  for (int64_t i = 0; i < samples; ++i) {
    weights[i] = static_cast<float>(raw[i] == 0.0 ? 0.0 : raw[i] / normaliser);
    loss += static_cast<double>(weights[i]) * static_cast<double>(losses[i]);
  }
  return {static_cast<float>(loss), normaliser};
}

}  // namespace sfron
