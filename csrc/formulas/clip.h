#pragma once
// The gradient's factor and the rule that skips a step, for both optimizers: read from host memory
// on the CPU and from device memory in a kernel, so that nothing waits for the norm.
#include "formulas/scalar.h"

namespace sfron {

constexpr float kClipEps = 1e-6f;  // torch.nn.utils.clip_grad_norm_ divides by (norm + 1e-6)

// What may change from step to step; in a CUDA graph it comes from device memory.
struct StepNumbers {
  double lr, weight_decay, slow_lr;
};

struct StepInputs {
  const float *norm, *grad_scale, *found_inf;  // [] or null
  const double* numbers;  // [3] or null: lr, weight_decay, slow_lr instead of `given`
  int64_t* skipped;       // [] or null: one more for a skipped step
  StepNumbers given;
  float max_norm;
  bool maximize;
};

struct StepState {
  // min(1, max_norm / (norm + 1e-6)) / grad_scale, negative to maximise: -(g f) and g (-f) are the
  // same
  float factor;
  bool skip;      // a non-finite norm, or an overflow that the caller found
  bool measured;  // a norm was given
};

SFRON_HD StepNumbers step_numbers(const StepInputs& in) {
  return in.numbers == nullptr ? in.given
                               : StepNumbers{in.numbers[0], in.numbers[1], in.numbers[2]};
}

SFRON_HD StepState step_state(const StepInputs& in) {
  StepState state{1.0f, false, in.norm != nullptr};
  if (in.grad_scale != nullptr) state.factor = state.factor / *in.grad_scale;
  if (in.norm != nullptr) {
    const float norm = *in.norm, clip = in.max_norm / (norm + kClipEps);
    state.factor = state.factor * (clip > 1.0f ? 1.0f : clip);
    state.skip = !(norm - norm == 0.0f);
  }
  if (in.found_inf != nullptr) state.skip = state.skip || *in.found_inf != 0.0f;
  if (in.maximize) state.factor = -state.factor;
  return state;
}

// By one thread of the whole step.
SFRON_HD void count_skip(const StepInputs& in, bool skip) {
  if (skip && in.skipped != nullptr) *in.skipped += 1;
}

}  // namespace sfron
