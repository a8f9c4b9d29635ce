#include "adamw_step/adamw_step.h"

#include "common/dtype.h"
#include "common/isa.h"
#include "common/lanes.h"
#include "common/runs.h"

namespace sfron {
namespace {

struct AdamwKernel {
  void operator()(const AdamwTensor& t, int64_t begin, int64_t end, AdamwScalars s) const {
    Scratch scratch[6];
    const float scale = t.scale, denominator = t.denominator;
    for (int64_t at = begin; at < end; at += kTile) {
      const int64_t n = std::min(kTile, end - at);
      if (t.slow_out != nullptr) stream_tile(t.slow_out, t.param, t.dtype, at, n, t.numel);
      float* param = load_tile(t.param, t.dtype, at, n, scratch[0]);  // [n]
      if (!s.skip) {
        const uint8_t* mask = mask_tile(t.mask, at);  // [ceil(n / 8)]
        const float* grad = load_tile(t.grad, t.dtype, at, n, scratch[1]);    // [n]
        float* m = load_tile(t.exp_avg, t.avg_dtype, at, n, scratch[2]);      // [n]
        float* v = load_tile(t.exp_avg_sq, t.sq_dtype, at, n, scratch[3]);    // [n]
        if (t.max_exp_avg_sq == nullptr) {
          each_lane(
              n, mask, [=](int64_t i) { prefetch(i, param, grad, m, v); },
              [=](int64_t i, bool selected) {
                const AdamwElement e =
                    adamw_one<false>({param[i], m[i], v[i], 0.0f}, grad[i], selected, scale, denominator, s);
                param[i] = e.param;
                m[i] = e.exp_avg;
                v[i] = e.exp_avg_sq;
              });
        } else {
          float* largest = load_tile(t.max_exp_avg_sq, t.max_dtype, at, n, scratch[4]);  // [n]
          each_lane(
              n, mask, [=](int64_t i) { prefetch(i, param, grad, m, v, largest); },
              [=](int64_t i, bool selected) {
                const AdamwElement e =
                    adamw_one<true>({param[i], m[i], v[i], largest[i]}, grad[i], selected, scale, denominator, s);
                param[i] = e.param;
                m[i] = e.exp_avg;
                v[i] = e.exp_avg_sq;
                largest[i] = e.max_exp_avg_sq;
              });
          store_tile(t.max_exp_avg_sq, t.max_dtype, at, n, largest);
        }
        store_tile(t.exp_avg, t.avg_dtype, at, n, m);
        store_tile(t.exp_avg_sq, t.sq_dtype, at, n, v);
      }
      if (t.slow_in != nullptr) {
        lerp_tile(param, load_tile(t.slow_in, t.dtype, at, n, scratch[5]), n, s.slow);
      }
      store_tile(t.param, t.dtype, at, n, param);
    }
  }
};

}  // namespace

void adamw_step_cpu(
    const std::vector<AdamwTensor>& tensors, const Runs& runs, int64_t begin, int64_t end, const AdamwScalars& s) {
  const auto update = [&](int64_t i, int64_t first, int64_t last) {
    run_isa(AdamwKernel{}, tensors[i], first, last, s);
  };
  runs.walk(begin, end, update, [&](size_t i) {
    prefetch_start(tensors[i].param);
    prefetch_start(tensors[i].grad);
  });
  end_stream();
}

}  // namespace sfron
