#include "interpolate/interpolate.h"

#include "common/dtype.h"
#include "common/isa.h"
#include "common/lanes.h"
#include "common/runs.h"

namespace sfron {
namespace {

struct InterpolateKernel {
  void operator()(const InterpolateTensor& t, int64_t begin, int64_t end, Lerp s) const {
    Scratch scratch[2];
    for (int64_t at = begin; at < end; at += kTile) {
      const int64_t n = std::min(kTile, end - at);
      float* slow = load_tile(t.slow, t.dtype, at, n, scratch[0]);  // [n]
      float* fast = load_tile(t.fast, t.dtype, at, n, scratch[1]);  // [n]
      each_lane(
          n, nullptr, [=](int64_t i) { prefetch(i, slow, fast); },
          [=](int64_t i, bool) { slow[i] = fast[i] = interpolate_one(slow[i], fast[i], s); });
      store_tile(t.slow, t.dtype, at, n, slow);
      store_tile(t.fast, t.dtype, at, n, fast);
    }
  }
};

}  // namespace

void interpolate_cpu(
    const std::vector<InterpolateTensor>& tensors, const Runs& runs, int64_t begin, int64_t end, const Lerp& s) {
  runs.walk(begin, end, [&](int64_t i, int64_t first, int64_t last) {
    run_streaming(InterpolateKernel{}, tensors[i], first, last, s);
  });
}

}  // namespace sfron
