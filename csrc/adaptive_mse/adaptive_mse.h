#pragma once
// Squared error per sample with the adaptive weight (docs/equations.md, 4 and 5), as diffusion
// models train with.
#include "formulas/scalar.h"

namespace sfron {

struct MseSamples {
  const void* prediction;  // [samples, elements]
  const void* target;      // [samples, elements]
  int64_t samples, elements;
  DType dtype;  // of both
};

// Each chunk of a sample has one partial sum; the chunks are fixed, so the threads cannot change
// the result.
constexpr int64_t kMseChunk = 16384;  // elements

SFRON_HD double squared_error_one(float prediction, float target) {
  const double difference = prediction - target;
  return difference * difference;
}

SFRON_HD float mse_backward_one(float prediction, float target, float sample_weight) {
  return (prediction - target) * sample_weight;
}

inline int64_t mse_chunks(const MseSamples& t) {
  return (t.elements + kMseChunk - 1) / kMseChunk;
}

// partials [samples, chunks]: writes the flattened range [begin, end).
void adaptive_mse_cpu(const MseSamples& t, int64_t begin, int64_t end, double* partials);

// The flattened range [begin, end) of chunks of the gradient [samples, elements]; sample_weights
// [samples].
void adaptive_mse_backward_cpu(const MseSamples& t, int64_t begin, int64_t end,
                               const float* sample_weights, void* gradient);

}  // namespace sfron
