#include "adamw_step/adamw_step.h"

#include "cpu/elements.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/runs.h"
#include "cpu/step.h"
#include "formulas/flags.h"

namespace sfron {
namespace {

template <bool kAmsgrad, bool kSlowFrom>
struct AdamwKernel {
  // P, S: how parameters and moments are seen. Averages narrower than their parameter are dithered.
  template <class P, class S>
  void operator()(As<P>, As<S>, const AdamwTensor& t, int64_t begin, int64_t end,
                  AdamwScalars s) const {
    constexpr bool kNarrow = sizeof(typename S::Element) < sizeof(typename P::Element);
    Scratch scratch[6];
    const float scale = t.scale, eps = t.eps;
    const int64_t step = static_cast<int64_t>(*t.step);
    for (int64_t at = begin; at < end; at += kTile) {
      const int64_t n = std::min(kTile, end - at);
      const SlowCopy slow_save(t.slow_save, t.param, t.dtype, at, n, t.numel);
      const uint8_t* mask = mask_tile(t.mask, at);                                  // [ceil(n / 8)]
      const P param(t.param, t.dtype, at, n, scratch[0]);                           // [n]
      const P grad(t.grad, t.dtype, at, n, scratch[1]);                             // [n]
      const P slow(kSlowFrom ? t.slow_from : nullptr, t.dtype, at, n, scratch[2]);  // [n]
      const S m(t.exp_avg, t.state_dtype, at, n, scratch[3]);                       // [n]
      const S v(t.exp_avg_sq, t.state_dtype, at, n, scratch[4]);                    // [n]
      const S w(kAmsgrad ? t.max_exp_avg_sq : nullptr, t.state_dtype, at, n, scratch[5]);  // [n]
      each_lane(
          n, mask,
          [=](int64_t i) {
            prefetch(i, param.address(), grad.address(), m.address(), v.address());
            if (kAmsgrad) prefetch(i, w.address());
            if (kSlowFrom) prefetch(i, slow.address());
            slow_save.block(i);
          },
          [=](int64_t i, bool selected) {
            const AdamwElement old{param[i], m[i], v[i], kAmsgrad ? w[i] : 0.0f};
            const AdamwElement e = adamw_one<kAmsgrad>(old, grad[i], selected, scale, eps, s);
            param[i] = kSlowFrom ? lerp_one(slow[i], e.param, s.slow) : e.param;
            if constexpr (kNarrow) {
              const uint32_t threshold = dither_threshold(at + i, step);
              m[i].set_dithered(e.exp_avg, threshold);
              v[i].set_dithered(e.exp_avg_sq, threshold);
            } else {
              m[i] = e.exp_avg;
              v[i] = e.exp_avg_sq;
            }
            if (kAmsgrad) w[i] = e.max_exp_avg_sq;
          });
      m.store();
      v.store();
      if (kAmsgrad) w.store();
      param.store();
    }
  }
};

}  // namespace

void adamw_step_cpu(const std::vector<AdamwTensor>& tensors, const Runs& runs, int64_t begin,
                    int64_t end, const AdamwScalars& s) {
  if (tensors.empty()) return;
  if (s.skip) return skip_step(tensors, runs, begin, end, s.slow);
  const auto& one = first_filled(tensors);
  with_flags(
      one.max_exp_avg_sq != nullptr, one.slow_from != nullptr, [&](auto amsgrad, auto slow_from) {
        walk_step(tensors, runs, begin, end, s.measured,
                  [&](int64_t i, int64_t first, int64_t last) {
                    const AdamwTensor& t = tensors[i];
                    with_elements(t.dtype, t.state_dtype, [&](auto param, auto state) {
                      run_isa(AdamwKernel<amsgrad, slow_from>{}, param, state, t, first, last, s);
                    });
                  });
      });
}

}  // namespace sfron
