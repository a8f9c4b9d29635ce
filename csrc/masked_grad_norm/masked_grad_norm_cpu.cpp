#include "masked_grad_norm/masked_grad_norm.h"

#include "common/dtype.h"
#include "common/isa.h"
#include "common/lanes.h"
#include "common/runs.h"

namespace sfron {
namespace {

// The tiles of a chunk are read in turn from its four quarters: one stream alone leaves a fifth of the bandwidth idle.
constexpr int64_t kStreams = 4;

struct MaskedGradNormKernel {
  void operator()(
      const MaskedGradNormTensor& t, int64_t begin, int64_t end, float inverse_scale, double* partials) const {
    Scratch scratch;
    for (; begin < end; begin += kNormChunk, ++partials) {
      const int64_t stop = std::min(begin + kNormChunk, end);
      const int64_t quarter = (stop - begin + kStreams * kTile - 1) / (kStreams * kTile) * kTile;
      double sum = 0.0;
      for (int64_t offset = 0; offset < quarter; offset += kTile) {
        for (int64_t at = begin + offset; at < stop; at += quarter) {
          const int64_t n = std::min(kTile, stop - at);
          const float* grad = load_tile(t.grad, t.dtype, at, n, scratch);       // [n]
          const uint8_t* mask = mask_tile(t.mask, at);  // [ceil(n / 8)]
          sum += sum_lanes(
              n, mask, [=](int64_t i) { prefetch(i, grad); },
              [=](int64_t i, bool selected) { return masked_square_one(grad[i], selected, inverse_scale); });
        }
      }
      *partials = sum;
    }
  }
};

}  // namespace

void masked_grad_norm_cpu(
    const std::vector<MaskedGradNormTensor>& tensors, const Runs& runs, int64_t begin, int64_t end,
    float inverse_scale, double* partials) {
  int64_t chunk = begin;
  runs.walk(begin, end, [&](int64_t i, int64_t first, int64_t last) {
    run_isa(MaskedGradNormKernel{}, tensors[i], first, last, inverse_scale, partials + chunk);
    chunk += (last - first + kNormChunk - 1) / kNormChunk;
  });
}

}  // namespace sfron
