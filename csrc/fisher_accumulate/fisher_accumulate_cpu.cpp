#include "fisher_accumulate/fisher_accumulate.h"

#include "cpu/elements.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/runs.h"

namespace sfron {
namespace {

struct FisherKernel {
  template <class Elements>
  void operator()(As<Elements>, const FisherTensor& t, int64_t begin, int64_t end,
                  float weight) const {
    Scratch scratch;
    for (int64_t at = begin; at < end; at += kTile) {
      const int64_t n = std::min(kTile, end - at);
      float* fisher = t.fisher + at;                         // [n]
      const Elements grad(t.grad, t.dtype, at, n, scratch);  // [n]
      each_lane(
          n, nullptr, [=](int64_t i) { prefetch(i, fisher, grad.address()); },
          [=](int64_t i, bool) { fisher[i] = fisher_accumulate_one(fisher[i], grad[i], weight); });
    }
  }
};

}  // namespace

void fisher_accumulate_cpu(const std::vector<FisherTensor>& tensors, const Runs& runs,
                           int64_t begin, int64_t end, float weight) {
  const auto add = [&](int64_t i, int64_t first, int64_t last) {
    with_elements(tensors[i].dtype, [&](auto elements) {
      run_streaming(tensors[i].dtype != DType::kFloat32, FisherKernel{}, elements, tensors[i],
                    first, last, weight);
    });
  };
  runs.walk(begin, end, add, [&](size_t i) {
    prefetch_start(tensors[i].fisher);
    prefetch_start(tensors[i].grad);
  });
}

}  // namespace sfron
