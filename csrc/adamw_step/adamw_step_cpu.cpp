#include "adamw_step/adamw_step.h"

#include "common/dtype.h"
#include "common/flags.h"
#include "common/isa.h"
#include "common/lanes.h"
#include "common/runs.h"
#include "common/step_cpu.h"

namespace sfron {
namespace {

template <bool kAmsgrad, bool kSlowIn>
struct AdamwKernel {
  void operator()(const AdamwTensor& t, int64_t begin, int64_t end, AdamwScalars s) const {
    Scratch scratch[6];
    const float scale = t.scale, eps = t.eps;
    for (int64_t at = begin; at < end; at += kTile) {
      const int64_t n = std::min(kTile, end - at);
      const SlowCopy slow_out(t.slow_out, t.param, t.dtype, at, n, t.numel);
      const uint8_t* mask = mask_tile(t.mask, at);                           // [ceil(n / 8)]
      float* param = load_tile(t.param, t.dtype, at, n, scratch[0]);         // [n]
      const float* grad = load_tile(t.grad, t.dtype, at, n, scratch[1]);     // [n]
      float* m = load_tile(t.exp_avg, t.avg_dtype, at, n, scratch[2]);       // [n]
      float* v = load_tile(t.exp_avg_sq, t.sq_dtype, at, n, scratch[3]);     // [n]
      float* w = kAmsgrad ? load_tile(t.max_exp_avg_sq, t.max_dtype, at, n, scratch[4]) : nullptr;  // [n]
      const float* slow = kSlowIn ? load_tile(t.slow_in, t.dtype, at, n, scratch[5]) : nullptr;     // [n]
      each_lane(
          n, mask,
          [=](int64_t i) {
            prefetch(i, param, grad, m, v);
            if (kAmsgrad) prefetch(i, w);
            if (kSlowIn) prefetch(i, slow);
            slow_out.block(i);
          },
          [=](int64_t i, bool selected) {
            const AdamwElement old{param[i], m[i], v[i], kAmsgrad ? w[i] : 0.0f};
            const AdamwElement e = adamw_one<kAmsgrad>(old, grad[i], selected, scale, eps, s);
            param[i] = kSlowIn ? lerp_one(slow[i], e.param, s.slow) : e.param;
            m[i] = e.exp_avg;
            v[i] = e.exp_avg_sq;
            if (kAmsgrad) w[i] = e.max_exp_avg_sq;
          });
      store_tile(t.exp_avg, t.avg_dtype, at, n, m);
      store_tile(t.exp_avg_sq, t.sq_dtype, at, n, v);
      if (kAmsgrad) store_tile(t.max_exp_avg_sq, t.max_dtype, at, n, w);
      store_tile(t.param, t.dtype, at, n, param);
    }
  }
};

}  // namespace

void adamw_step_cpu(
    const std::vector<AdamwTensor>& tensors, const Runs& runs, int64_t begin, int64_t end, const AdamwScalars& s) {
  if (tensors.empty()) return;
  if (s.skip) return skip_step(tensors, runs, begin, end, s.slow);
  const auto& one = first_filled(tensors);
  const auto run = [&](auto amsgrad, auto slow_in) {
    walk_step(tensors, runs, begin, end, s.measured, [&](int64_t i, int64_t first, int64_t last) {
      run_isa(AdamwKernel<amsgrad, slow_in>{}, tensors[i], first, last, s);
    });
  };
  with_flags(one.max_exp_avg_sq != nullptr, one.slow_in != nullptr, run);
}

}  // namespace sfron
