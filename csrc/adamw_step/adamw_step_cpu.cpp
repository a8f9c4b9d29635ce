#include "adamw_step/adamw_step.h"

#include "cpu/compact.h"
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

// Weights in two pieces, moments in codes: by way of tiles of floats, whatever they are kept as.
template <bool kAmsgrad, bool kSlowFrom>
struct CompactAdamwKernel {
  void operator()(const AdamwTensor& t, int64_t begin, int64_t end, AdamwScalars s) const {
    Scratch scratch[6];
    const WeightCorrections& c = t.corrections;
    const Scales scales{t.scales, t.row, 2};
    const bool narrow = is_narrow(t.state_dtype, t.dtype, c.param != nullptr);
    const float scale = t.scale, eps = t.eps;
    const int64_t step = static_cast<int64_t>(*t.step);
    for (int64_t at = begin, n = 0; at < end; at += n) {
      n = scales.tile(at, end);
      const SlowCopy slow_save(t.slow_save, t.param, t.dtype, at, n, t.numel);
      save_corrections(c, at, n);
      const uint8_t* mask = mask_tile(t.mask, at);  // [ceil(n / 8)]
      float* param = load_weights(t.param, t.dtype, c.param, c.bytes, at, n, scratch[0]);  // [n]
      const float* grad = load_tile(t.grad, t.dtype, at, n, scratch[1]);                   // [n]
      const float* slow = nullptr;                                                         // [n]
      if (kSlowFrom)
        slow = load_weights(t.slow_from, t.dtype, c.slow_from, c.bytes, at, n, scratch[2]);
      float* m = load_moments<true>(t.exp_avg, t.state_dtype, scales.of(at, 0), at, n, scratch[3]);
      float* v =
          load_moments<false>(t.exp_avg_sq, t.state_dtype, scales.of(at, 1), at, n, scratch[4]);
      float* w = kAmsgrad ? load_tile(t.max_exp_avg_sq, t.state_dtype, at, n, scratch[5]) : nullptr;
      each_lane(
          n, mask, [=](int64_t i) { slow_save.block(i); },
          [=](int64_t i, bool selected) {
            const AdamwElement old{param[i], m[i], v[i], kAmsgrad ? w[i] : 0.0f};
            const AdamwElement e = adamw_one<kAmsgrad>(old, grad[i], selected, scale, eps, s);
            param[i] = kSlowFrom ? lerp_one(slow[i], e.param, s.slow) : e.param;
            m[i] = e.exp_avg;
            v[i] = e.exp_avg_sq;
            if (kAmsgrad) w[i] = e.max_exp_avg_sq;
          });
      store_moments<true>(t.exp_avg, t.state_dtype, narrow, scales.of(at, 0), at, n, m, step);
      store_moments<false>(t.exp_avg_sq, t.state_dtype, narrow, scales.of(at, 1), at, n, v, step);
      if (kAmsgrad) store_tile(t.max_exp_avg_sq, t.state_dtype, at, n, w);
      store_weights(t.param, t.dtype, c.param, c.bytes, at, n, param, step);
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
                    if (t.is_compact()) {
                      Scales{t.scales, t.row, 2}.whole_groups(&first, &last);
                      return run_isa(CompactAdamwKernel<amsgrad, slow_from>{}, t, first, last, s);
                    }
                    with_elements(t.dtype, t.state_dtype, [&](auto param, auto state) {
                      run_isa(AdamwKernel<amsgrad, slow_from>{}, param, state, t, first, last, s);
                    });
                  });
      });
}

}  // namespace sfron
