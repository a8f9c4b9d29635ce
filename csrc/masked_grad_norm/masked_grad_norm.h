#pragma once
// The L2 norm of the selected, unscaled gradients (docs/equations.md, 6). Squares of floats are
// exact in double, so the only error is that of the additions: below 2 n 2^-53 of the sum, and the
// final rounding to fp32.
#include <vector>

#include "formulas/scalar.h"

namespace sfron {

class Runs;

// Each chunk of a tensor has one partial sum. The chunks are fixed, so the threads cannot change
// the result.
constexpr int64_t kNormChunk = 16384;  // elements

struct MaskedGradNormTensor {
  const void* grad;     // [numel]
  const uint8_t* mask;  // [ceil(numel / 8)] or null
  int64_t numel;
  DType dtype;
  int32_t unused = 0;  // no padding: tables on the device are compared as bytes
};

// Select, never multiply, by the mask: 0 * inf is NaN.
SFRON_HD double masked_square_one(float grad, bool selected, float inverse_scale) {
  const double g = selected ? grad * inverse_scale : 0.0f;
  return g * g;
}

// Writes partials[c], the sum of squares of chunk c, for c in [begin, end); `runs` has units of
// kNormChunk.
void masked_grad_norm_cpu(const std::vector<MaskedGradNormTensor>& tensors, const Runs& runs,
                          int64_t begin, int64_t end, float inverse_scale, double* partials);

// norm, grad_scale: [] on the device; grad_scale may be null.
void launch_masked_grad_norm(const std::vector<MaskedGradNormTensor>& tensors,
                             const float* grad_scale, float* norm, const Queue& queue);

}  // namespace sfron
