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
      const auto before = [=](int64_t i) { prefetch(i, slow.address(), fast.address()); };
      const auto each = [=](int64_t i, bool) {
        slow[i] = fast[i] = interpolate_one(slow[i], fast[i], s);
      };
      if constexpr (kPairs<Elements>) {
        const auto both = [=](int64_t i, bool, bool) {
          const Pair from = slow.pair(i), to = fast.pair(i);
          const Pair x{interpolate_one(from.low, to.low, s),
                       interpolate_one(from.high, to.high, s)};
          slow.set_pair(i, x);
          fast.set_pair(i, x);
        };
        each_pair(n, nullptr, before, both, each);
      } else {
        each_lane(n, nullptr, before, each);
      }
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
      run_streaming(tensors[i].dtype != DType::kFloat32, InterpolateKernel{}, elements, tensors[i],
                    first, last, s);
    });
  });
}

}  // namespace sfron
