#include "masked_grad_norm/masked_grad_norm.h"

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/runs.h"
#include "cpu/tiles.h"

namespace sfron {
namespace {

// Each quarter of a chunk has a sum of its own, so that its tiles may be taken in turn with those
// of the others: on some processors one stream alone leaves a fifth of the bandwidth idle.
constexpr int64_t kQuarters = 4;

struct MaskedGradNormKernel {
  void operator()(const MaskedGradNormTensor& t, int64_t begin, int64_t end, float inverse_scale,
                  double* partials) const {
    Scratch scratch;
    for (; begin < end; begin += kNormChunk, ++partials) {
      const int64_t stop = std::min(begin + kNormChunk, end);
      const int64_t all = (stop - begin + kTile - 1) / kTile;  // tiles
      const int64_t tiles = (all + kQuarters - 1) / kQuarters, quarters = (all + tiles - 1) / tiles;
      alignas(64) double lane[kQuarters][kLanes];
      std::memset(lane, 0, quarters * sizeof lane[0]);
      for (int64_t i = 0; i < quarters * tiles; ++i) {
        const int64_t quarter = kFetchAhead ? i % quarters : i / tiles,
                      tile = kFetchAhead ? i / quarters : i % tiles;
        const int64_t at = begin + (quarter * tiles + tile) * kTile;
        if (at >= stop) continue;
        const int64_t n = std::min(kTile, stop - at);
        const float* grad = load_tile(t.grad, t.dtype, at, n, scratch);  // [n]
        const uint8_t* mask = mask_tile(t.mask, at);                     // [ceil(n / 8)]
        add_lanes(
            lane[quarter], n, mask, [=](int64_t j) { prefetch(j, grad); },
            [=](int64_t j, bool selected) {
              return masked_square_one(grad[j], selected, inverse_scale);
            });
      }
      *partials = 0.0;
      for (int64_t quarter = 0; quarter < quarters; ++quarter) *partials += sum_of(lane[quarter]);
    }
  }
};

}  // namespace

void masked_grad_norm_cpu(const std::vector<MaskedGradNormTensor>& tensors, const Runs& runs,
                          int64_t begin, int64_t end, float inverse_scale, double* partials) {
  int64_t chunk = begin;
  const auto add = [&](int64_t i, int64_t first, int64_t last) {
    run_isa(MaskedGradNormKernel{}, tensors[i], first, last, inverse_scale, partials + chunk);
    chunk += (last - first + kNormChunk - 1) / kNormChunk;
  };
  runs.walk(begin, end, add, [&](size_t i) { prefetch_start(tensors[i].grad); });
}

}  // namespace sfron
