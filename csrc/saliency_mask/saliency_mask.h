#pragma once
// F_forget + eps >= gamma (F_retain + eps) (docs/equations.md, 3): one bit per weight, and how
// many are set.
#include <atomic>
#include <vector>

#include "formulas/scalar.h"

namespace sfron {

class Runs;

struct SaliencyTensor {
  const float* forget;  // [numel]
  const float* retain;  // [numel]
  uint8_t* mask;        // [ceil(numel / 8)], written whole: unused high bits are zero
  int64_t numel;
};

struct SaliencyScalars {
  float threshold, eps;
};

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

}  // namespace sfron
