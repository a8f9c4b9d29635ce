#pragma once
// F_forget + eps >= gamma (F_retain + eps) (README, equation 3): one bit per weight, and how many
// are set. Two ops: of finished Fishers, and of a retain Fisher that still lacks its last gradient
// and is finished in the same pass.
#include <atomic>
#include <vector>

#include "formulas/scalar.h"

namespace sfron {

class Runs;

struct SaliencyTensor {
  const float* forget;  // [numel]
  float* retain;        // [numel], written where there is a gradient
  const void* grad;     // [numel] or null, the same for all tensors of a list
  uint8_t* mask;        // [ceil(numel / 8)], written whole: unused high bits are zero
  int64_t numel;
  DType dtype;         // of the gradient
  int32_t unused = 0;  // no padding: tables on the device are compared as bytes
};

struct SaliencyScalars {
  float threshold, eps;
  float weight, total;  // of the last gradient, and of all of them
};

// The mean, from the sum and the last gradient.
SFRON_HD float finish_fisher_one(float sum, float grad, const SaliencyScalars& s) {
  return fisher_accumulate_one(sum, grad, s.weight) / s.total;
}

// A NaN selects nothing.
SFRON_HD bool saliency_one(float forget, float retain, const SaliencyScalars& s) {
  return forget + s.eps >= (retain + s.eps) * s.threshold;
}

// counts[i] += weights selected in tensor i; whole numbers, so the order of the threads does not
// matter.
void saliency_mask_cpu(const std::vector<SaliencyTensor>& tensors, const Runs& runs, int64_t begin,
                       int64_t end, const SaliencyScalars& s, std::atomic<int64_t>* counts);

// counts: [tensors] on the device.
void launch_saliency_mask(const std::vector<SaliencyTensor>& tensors, const SaliencyScalars& s,
                          int64_t* counts, const Queue& queue);
void launch_fisher_saliency_mask(const std::vector<SaliencyTensor>& tensors,
                                 const SaliencyScalars& s, int64_t* counts, const Queue& queue);

}  // namespace sfron
