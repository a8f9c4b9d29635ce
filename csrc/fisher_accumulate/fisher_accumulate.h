#pragma once
// F += weight * g^2 (docs/equations.md, 2), F in fp32 whatever the gradient's dtype:
// fisher_accumulate_one in formulas/scalar.h.
#include <vector>

#include "formulas/scalar.h"

namespace sfron {

class Runs;

struct FisherTensor {
  float* fisher;     // [numel]
  const void* grad;  // [numel]
  int64_t numel;
  DType dtype;         // of the gradient
  int32_t unused = 0;  // no padding: tables on the device are compared as bytes
};

void fisher_accumulate_cpu(const std::vector<FisherTensor>& tensors, const Runs& runs,
                           int64_t begin, int64_t end, float weight);
void launch_fisher_accumulate(const std::vector<FisherTensor>& tensors, const Number& weight,
                              const Queue& queue);

}  // namespace sfron
