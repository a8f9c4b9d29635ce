#include "interpolate/interpolate.h"

#include "cpu/elements.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/runs.h"

namespace sfron {
namespace {

struct InterpolateKernel {
  template <class Elements>
  void operator()(As<Elements>, const InterpolateTensor& t, int64_t begin, int64_t end,
                  Lerp s) const {
    Scratch scratch[2];
    for (int64_t at = begin; at < end; at += kTile) {
      const int64_t n = std::min(kTile, end - at);
      const Elements slow(t.slow, t.dtype, at, n, scratch[0]);  // [n]
      const Elements fast(t.fast, t.dtype, at, n, scratch[1]);  // [n]
      each_lane(
          n, nullptr, [=](int64_t i) { prefetch(i, slow.address(), fast.address()); },
          [=](int64_t i, bool) { slow[i] = fast[i] = interpolate_one(slow[i], fast[i], s); });
      slow.store();
      fast.store();
    }
  }
};

}  // namespace

void interpolate_cpu(const std::vector<InterpolateTensor>& tensors, const Runs& runs, int64_t begin,
                     int64_t end, const Lerp& s) {
  runs.walk(begin, end, [&](int64_t i, int64_t first, int64_t last) {
    with_elements(tensors[i].dtype, [&](auto elements) {
      run_streaming(InterpolateKernel{}, elements, tensors[i], first, last, s);
    });
  });
}

}  // namespace sfron
