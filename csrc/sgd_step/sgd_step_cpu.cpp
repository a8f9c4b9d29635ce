#include "sgd_step/sgd_step.h"

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
    for (int64_t at = begin; at < end; at += kTile) {
      const int64_t n = std::min(kTile, end - at);
      const SlowCopy slow_save(t.slow_save, t.param, t.dtype, at, n, t.numel);
      const uint8_t* mask = mask_tile(t.mask, at);                        // [ceil(n / 8)]
      float* param = load_tile(t.param, t.dtype, at, n, scratch[0]);      // [n]
      const float* grad = load_tile(t.grad, t.dtype, at, n, scratch[1]);  // [n]
      float* m =
          kMomentum ? load_tile(t.momentum, t.momentum_dtype, at, n, scratch[2]) : nullptr;  // [n]
      const float* slow =
          kSlowFrom ? load_tile(t.slow_from, t.dtype, at, n, scratch[3]) : nullptr;  // [n]
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
      if (kMomentum) store_tile(t.momentum, t.momentum_dtype, at, n, m);
      store_tile(t.param, t.dtype, at, n, param);
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
        if (t.momentum != nullptr) zero_tile(t.momentum, t.momentum_dtype, first, last - first);
      });
    }
    return skip_step(tensors, runs, begin, end, s.slow);
  }
  const auto& one = first_filled(tensors);
  const auto run = [&](auto momentum, auto slow_from) {
    walk_step(tensors, runs, begin, end, s.measured, [&](int64_t i, int64_t first, int64_t last) {
      run_isa(SgdKernel<momentum, slow_from>{}, tensors[i], first, last, s);
    });
  };
  with_flags(one.momentum != nullptr, one.slow_from != nullptr, run);
}

}  // namespace sfron
