#pragma once
// One pass of torch.optim.SGD over a list: unscale, clip, mask, decay, momentum, update, slow
// interpolation (docs/equations.md, 6 to 9).
#include <vector>

#include "formulas/clip.h"
#include "formulas/scalar.h"
#include "formulas/split_weights.h"

namespace sfron {

class Runs;

struct SgdTensor {
  void* param;            // [numel]
  const void* grad;       // [numel], the parameter's dtype
  void* momentum;         // [numel] or null
  void* slow_save;        // [numel] or null: receives the parameter as it was
  const void* slow_from;  // [numel] or null: the result is interpolated from here
  const uint8_t* mask;    // [ceil(numel / 8)] or null
  int64_t numel;
  DType dtype, momentum_dtype;
  float* step;  // [] beside the parameter or null: the updates so far, for what is dithered
  WeightCorrections corrections;
  float* scales;  // [groups] or null: the momentum is no codes
  int64_t row;    // elements of one index of the first dimension

  bool is_compact() const { return corrections.param != nullptr || scales != nullptr; }
};

// The arguments of one call, as given.
struct SgdOptions {
  double momentum, dampening;
  bool nesterov, first, freeze;
};

// Prepared in double and rounded once, where torch rounds.
struct SgdScalars {
  float factor;  // of the gradient: clip and unscale, negative to maximise
  float lr, momentum, undampened, weight_decay;  // undampened = 1 - dampening
  bool decay, nesterov, first, freeze, skip, measured;
  Lerp slow;
};

SFRON_HD SgdScalars sgd_scalars(const SgdOptions& o, const StepNumbers& h, const StepState& state) {
  SgdScalars s{};
  s.factor = state.factor;
  s.lr = static_cast<float>(h.lr);
  s.momentum = static_cast<float>(o.momentum);
  s.undampened = static_cast<float>(1.0 - o.dampening);
  s.weight_decay = static_cast<float>(h.weight_decay);
  s.decay = h.weight_decay != 0.0;
  s.nesterov = o.nesterov;
  s.first = o.first;
  s.freeze = o.freeze;
  s.skip = state.skip;
  s.measured = state.measured;
  s.slow = make_lerp(h.slow_lr);
  return s;
}

struct SgdElement {
  float param, momentum;
};

// Without a momentum buffer. `decay` is a flag and not a factor of 0: -0 + 0 would lose the sign.
SFRON_HD float sgd_one(float p, float grad, bool selected, const SgdScalars& s) {
  float g = choose(bits_if(selected), grad * s.factor, 0.0f);
  g = choose(bits_if(s.decay), g + p * s.weight_decay, g);
  return choose(bits_if(selected) | bits_if(!s.freeze), p - g * s.lr, p);
}

// A frozen weight keeps its momentum, but an uninitialised one still needs a value: 0.
SFRON_HD SgdElement sgd_momentum_one(SgdElement old, float grad, bool selected,
                                     const SgdScalars& s) {
  const uint32_t first = bits_if(s.first), write = bits_if(selected) | bits_if(!s.freeze);
  float g = choose(bits_if(selected), grad * s.factor, 0.0f);
  g = choose(bits_if(s.decay), g + old.param * s.weight_decay, g);
  const float m = choose(first, g, old.momentum * s.momentum + g * s.undampened);
  g = choose(bits_if(s.nesterov), g + m * s.momentum, m);
  return {choose(write, old.param - g * s.lr, old.param),
          choose(write, m, choose(first, 0.0f, old.momentum))};
}

void sgd_step_cpu(const std::vector<SgdTensor>& tensors, const Runs& runs, int64_t begin,
                  int64_t end, const SgdScalars& s);
void launch_sgd_step(const std::vector<SgdTensor>& tensors, const SgdOptions& options,
                     const StepInputs& inputs, const Queue& queue);

}  // namespace sfron
