#include "sgd_step/sgd_step.h"

#include "cpu/compact.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/runs.h"
#include "cpu/step.h"
#include "cpu/tiles.h"
#include "formulas/flags.h"

namespace sfron {
namespace {

template <bool kMomentum, bool kSlowFrom>
struct SgdKernel {
  void operator()(const SgdTensor& t, int64_t begin, int64_t end, SgdScalars s) const {
    Scratch scratch[4];
    const WeightCorrections& c = t.corrections;
    const Scales scales{t.scales, t.row, 1};
    const int64_t step = t.step == nullptr ? 0 : static_cast<int64_t>(*t.step);
    for (int64_t at = begin, n = 0; at < end; at += n) {
      n = scales.tile(at, end);
      const SlowCopy slow_save(t.slow_save, t.param, t.dtype, at, n, t.numel);
      save_corrections(c, at, n);
      float* const scale = scales.of(at, 0);
      const uint8_t* mask = mask_tile(t.mask, at);                        // [ceil(n / 8)]
      const float* grad = load_tile(t.grad, t.dtype, at, n, scratch[1]);  // [n]
      float* param = load_weights(t.param, t.dtype, c.param, c.bytes, at, n, scratch[0]);  // [n]
      float* m = nullptr;                                                                  // [n]
      const float* slow = nullptr;                                                         // [n]
      if (kMomentum) m = load_moments<true>(t.momentum, t.momentum_dtype, scale, at, n, scratch[2]);
      if (kSlowFrom)
        slow = load_weights(t.slow_from, t.dtype, c.slow_from, c.bytes, at, n, scratch[3]);
      each_lane(
          n, mask,
          [=](int64_t i) {
            prefetch(i, param, grad);
            if (kMomentum) prefetch(i, m);
            if (kSlowFrom) prefetch(i, slow);
            slow_save.block(i);
          },
          [=](int64_t i, bool selected) {
            SgdElement e{};
            if (kMomentum) {
              e = sgd_momentum_one({param[i], m[i]}, grad[i], selected, s);
              m[i] = e.momentum;
            } else {
              e.param = sgd_one(param[i], grad[i], selected, s);
            }
            param[i] = kSlowFrom ? lerp_one(slow[i], e.param, s.slow) : e.param;
          });
      if (kMomentum)
        store_moments<true>(t.momentum, t.momentum_dtype, false, scale, at, n, m, step);
      store_weights(t.param, t.dtype, c.param, c.bytes, at, n, param, step);
    }
  }
};

}  // namespace

void sgd_step_cpu(const std::vector<SgdTensor>& tensors, const Runs& runs, int64_t begin,
                  int64_t end, const SgdScalars& s) {
  if (tensors.empty()) return;
  if (s.skip) {
    if (s.first) {
      runs.walk(begin, end, [&](int64_t i, int64_t first, int64_t last) {
        const SgdTensor& t = tensors[i];
        if (t.momentum == nullptr) return;
        if (t.scales == nullptr) {
          zero_tile(t.momentum, t.momentum_dtype, first, last - first);
        } else {
          std::memset(static_cast<char*>(t.momentum) + first, 0, last - first);
        }
      });
    }
    return skip_step(tensors, runs, begin, end, s.slow);
  }
  const auto& one = first_filled(tensors);
  const auto run = [&](auto momentum, auto slow_from) {
    walk_step(tensors, runs, begin, end, s.measured, [&](int64_t i, int64_t first, int64_t last) {
      const SgdTensor& t = tensors[i];
      Scales{t.scales, t.row, 1}.whole_groups(&first, &last);
      run_isa(SgdKernel<momentum, slow_from>{}, t, first, last, s);
    });
  };
  with_flags(one.momentum != nullptr, one.slow_from != nullptr, run);
}

}  // namespace sfron
