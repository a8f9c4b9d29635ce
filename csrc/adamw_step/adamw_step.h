#pragma once
// One pass of torch.optim.AdamW (or Adam) over a list: unscale, clip, mask, decay, moments, update,
// slow interpolation (docs/equations.md, 6 to 9).
#include <cmath>
#include <vector>

#include "formulas/clip.h"
#include "formulas/scalar.h"
#include "formulas/split_weights.h"

namespace sfron {

class Runs;

struct AdamwTensor {
  void* param;            // [numel]
  const void* grad;       // [numel], the parameter's dtype
  void* exp_avg;          // [numel]
  void* exp_avg_sq;       // [numel]
  void* max_exp_avg_sq;   // [numel] or null: no AMSGrad
  void* slow_save;        // [numel] or null: receives the parameter as it was
  const void* slow_from;  // [numel] or null: the result is interpolated from here
  const uint8_t* mask;    // [ceil(numel / 8)] or null
  int64_t numel;
  DType dtype, state_dtype;  // of the parameter, of its moments
  float scale, eps;          // of this step, see Corrections
  float* step;               // [] beside the parameter: the updates so far
  WeightCorrections corrections;
  float* scales;  // [groups, 2] or null: the moments are no codes
  int64_t row;    // elements of one index of the first dimension

  bool is_compact() const { return corrections.param != nullptr || scales != nullptr; }
};

// The arguments of one call, as given.
struct AdamwOptions {
  double beta1, beta2, eps;
  bool decoupled, freeze;
};

// Prepared in double and rounded once, where torch rounds.
struct AdamwScalars {
  float factor;                      // of the gradient: clip and unscale, negative to maximise
  float keep;                        // of the parameter: 1 - lr * weight_decay if decoupled, else 1
  float beta2, rest2, weight_decay;  // rest2 = 1 - beta2
  bool l2, freeze, skip, measured;   // l2: the decay joins the gradient
  Lerp avg, slow;
};

SFRON_HD AdamwScalars adamw_scalars(const AdamwOptions& o, const StepNumbers& h,
                                    const StepState& state) {
  AdamwScalars s{};
  s.factor = state.factor;
  s.keep = o.decoupled ? static_cast<float>(1.0 - h.lr * h.weight_decay) : 1.0f;
  s.beta2 = static_cast<float>(o.beta2);
  s.rest2 = static_cast<float>(1.0 - o.beta2);
  s.weight_decay = static_cast<float>(h.weight_decay);
  s.l2 = !o.decoupled && h.weight_decay != 0.0;
  s.freeze = o.freeze;
  s.skip = state.skip;
  s.measured = state.measured;
  s.avg = make_lerp(1.0 - o.beta1);
  s.slow = make_lerp(h.slow_lr);
  return s;
}

struct AdamwElement {
  float param, exp_avg, exp_avg_sq, max_exp_avg_sq;
};

// What a step is made of, for a kernel that takes it in turns. `write`, as bits: whether an element
// changes.
SFRON_HD uint32_t adamw_writes(bool selected, const AdamwScalars& s) {
  return bits_if(selected) | bits_if(!s.freeze);
}

// The new averages; of the old element neither maximum nor, without `l2`, the parameter matters.
SFRON_HD AdamwElement adamw_averages(const AdamwElement& old, float grad, bool selected,
                                     const AdamwScalars& s) {
  float g = choose(bits_if(selected), grad * s.factor, 0.0f);
  g = choose(bits_if(s.l2), g + old.param * s.weight_decay, g);
  const float m = lerp_one(old.exp_avg, g, s.avg);
  return {old.param, m, old.exp_avg_sq * s.beta2 + (g * s.rest2) * g, old.max_exp_avg_sq};
}

SFRON_HD float adamw_divisor(float square, float eps) {
  return sqrtf(square) + eps;
}

SFRON_HD float adamw_updated(float param, float exp_avg, float divisor, float scale,
                             const AdamwScalars& s) {
  return param * s.keep - (exp_avg * scale) / divisor;
}

template <bool kAmsgrad>
SFRON_HD AdamwElement adamw_one(AdamwElement old, float grad, bool selected, float scale, float eps,
                                const AdamwScalars& s) {
  const AdamwElement e = adamw_averages(old, grad, selected, s);
  const float m = e.exp_avg, v = e.exp_avg_sq;
  const float largest =
      old.max_exp_avg_sq > v || old.max_exp_avg_sq != old.max_exp_avg_sq ? old.max_exp_avg_sq : v;
  const float divisor = adamw_divisor(kAmsgrad ? largest : v, eps);
  const float updated = adamw_updated(old.param, m, divisor, scale, s);
  const uint32_t write = adamw_writes(selected, s);
  return {choose(write, updated, old.param), choose(write, m, old.exp_avg),
          choose(write, v, old.exp_avg_sq), choose(write, largest, old.max_exp_avg_sq)};
}

// base ** exponent by squaring: the same bits on every processor, unlike a library's pow.
SFRON_HD double int_power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if (exponent & 1) result *= base;
  }
  return result;
}

// The bias corrections, moved into the learning rate and into eps (Kingma and Ba, end of section
// 2): what stays per element is one division less. scale = lr sqrt(1 - beta2^step) / (1 -
// beta1^step).
struct Corrections {
  float scale, eps;
};

SFRON_HD Corrections adam_corrections(double lr, double beta1, double beta2, double eps,
                                      int64_t step) {
  const double root = std::sqrt(1.0 - int_power(beta2, step));
  return {static_cast<float>(lr * root / (1.0 - int_power(beta1, step))),
          static_cast<float>(eps * root)};
}

void adamw_step_cpu(const std::vector<AdamwTensor>& tensors, const Runs& runs, int64_t begin,
                    int64_t end, const AdamwScalars& s);
void launch_adamw_step(const std::vector<AdamwTensor>& tensors, const AdamwOptions& options,
                       const StepInputs& inputs, const Queue& queue);

}  // namespace sfron
