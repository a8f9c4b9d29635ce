// Two ops whose last block works on what the others have written or read, with all blocks alive at
// once: for ThreadSanitizer (test_cuda_on_host.py), which the other host tests cannot run under.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "adamw_step/adamw_step.h"
#include "masked_grad_norm/masked_grad_norm.h"

using namespace sfron;

int main() {
  const int64_t numel = 4000;  // eight units, four blocks
  std::vector<float> grad(numel, 0.5f), param(numel), avg(numel), square(numel);
  float step = 0.0f;
  for (int round = 1; round <= 3; ++round) {
    float norm = -1.0f;
    launch_masked_grad_norm({{grad.data(), nullptr, numel, DType::kFloat32}}, nullptr, &norm,
                            {0, nullptr});
    AdamwTensor tensor{};
    tensor.param = param.data();
    tensor.grad = grad.data();
    tensor.exp_avg = avg.data();
    tensor.exp_avg_sq = square.data();
    tensor.numel = numel;
    tensor.step = &step;
    StepInputs inputs{};
    inputs.norm = &norm;
    inputs.max_norm = 1.0f;
    inputs.given = {0.1, 0.0, 1.0};
    launch_adamw_step({tensor}, {0.9, 0.999, 1e-8, true, false}, inputs, {0, nullptr});
    if (norm != static_cast<float>(std::sqrt(numel * 0.25)) || step != round)
      return std::puts("wrong"), 1;
  }
  return std::puts("no race"), 0;
}
