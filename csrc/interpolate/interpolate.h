#pragma once
// slow += alpha (fast - slow); fast = slow (docs/equations.md, 9): the op to read first and to copy
// for a new one.
#include <vector>

#include "formulas/scalar.h"

namespace sfron {

class Runs;

struct InterpolateTensor {
  void* slow;  // [numel]
  void* fast;  // [numel]
  int64_t numel;
  DType dtype;         // of both
  int32_t unused = 0;  // no padding: tables on the device are compared as bytes
};

SFRON_HD float interpolate_one(float slow, float fast, const Lerp& s) {
  return lerp_one(slow, fast, s);
}

// Units [begin, end) of the list, see cpu/runs.h.
void interpolate_cpu(const std::vector<InterpolateTensor>& tensors, const Runs& runs, int64_t begin,
                     int64_t end, const Lerp& s);
void launch_interpolate(const std::vector<InterpolateTensor>& tensors, const Number& slow_lr,
                        const Queue& queue);

}  // namespace sfron
