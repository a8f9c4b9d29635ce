#include "sgd_step/sgd_step.h"

#include "common/dtype.h"
#include "common/isa.h"
#include "common/lanes.h"
#include "common/runs.h"

namespace sfron {
namespace {

struct SgdKernel {
  void operator()(const SgdTensor& t, int64_t begin, int64_t end, SgdScalars s) const {
    Scratch scratch[4];
    for (int64_t at = begin; at < end; at += kTile) {
      const int64_t n = std::min(kTile, end - at);
      if (t.slow_out != nullptr) stream_tile(t.slow_out, t.param, t.dtype, at, n, t.numel);
      float* param = load_tile(t.param, t.dtype, at, n, scratch[0]);                        // [n]
      const uint8_t* mask = mask_tile(t.mask, at);  // [ceil(n / 8)]
      if (!s.skip) {
        const float* grad = load_tile(t.grad, t.dtype, at, n, scratch[1]);  // [n]
        if (t.momentum == nullptr) {
          each_lane(
              n, mask, [=](int64_t i) { prefetch(i, param, grad); },
              [=](int64_t i, bool selected) { param[i] = sgd_one(param[i], grad[i], selected, s); });
        } else {
          float* momentum = load_tile(t.momentum, t.momentum_dtype, at, n, scratch[2]);  // [n]
          each_lane(
              n, mask, [=](int64_t i) { prefetch(i, param, grad, momentum); },
              [=](int64_t i, bool selected) {
                const SgdElement e = sgd_momentum_one({param[i], momentum[i]}, grad[i], selected, s);
                param[i] = e.param;
                momentum[i] = e.momentum;
              });
          store_tile(t.momentum, t.momentum_dtype, at, n, momentum);
        }
      } else if (s.first && t.momentum != nullptr) {
        zero_tile(t.momentum, t.momentum_dtype, at, n);
      }
      if (t.slow_in != nullptr) {
        lerp_tile(param, load_tile(t.slow_in, t.dtype, at, n, scratch[3]), n, s.slow);
      }
      store_tile(t.param, t.dtype, at, n, param);
    }
  }
};

}  // namespace

void sgd_step_cpu(
    const std::vector<SgdTensor>& tensors, const Runs& runs, int64_t begin, int64_t end, const SgdScalars& s) {
  const auto update = [&](int64_t i, int64_t first, int64_t last) {
    run_isa(SgdKernel{}, tensors[i], first, last, s);
  };
  runs.walk(begin, end, update, [&](size_t i) {
    prefetch_start(tensors[i].param);
    prefetch_start(tensors[i].grad);
  });
  end_stream();
}

}  // namespace sfron
