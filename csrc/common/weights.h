#pragma once
// From per-sample losses to the adaptive weights max(l, floor)^-lambda / sum (README, equations 4 and 5). Host, in double.
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace sfron {

// The floor keeps a sample with a loss of exactly 0 from swallowing all weight; a NaN loss stays NaN.
inline double raw_weight(float loss, double temperature, double floor) {
  const double base = loss < floor ? floor : static_cast<double>(loss);
  return std::pow(base, -temperature);
}

struct WeightedLoss {
  float loss, normaliser;
};

// losses, raw, weights [samples]; adds in order, so threads cannot change the bits. No labelled sample: 0, not 0 / 0.
inline WeightedLoss weighted_loss(int64_t samples, const float* losses, const double* raw, float* weights) {
  double normaliser = 0.0, loss = 0.0;
  for (int64_t i = 0; i < samples; ++i) normaliser += raw[i];
  for (int64_t i = 0; i < samples; ++i) {
    weights[i] = static_cast<float>(normaliser == 0.0 ? raw[i] : raw[i] / normaliser);
    loss += static_cast<double>(weights[i]) * static_cast<double>(losses[i]);
  }
  return {static_cast<float>(loss), static_cast<float>(normaliser)};
}

}  // namespace sfron
