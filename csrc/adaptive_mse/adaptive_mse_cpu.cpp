#include "adaptive_mse/adaptive_mse.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/tiles.h"

namespace sfron {
namespace {

struct ForwardKernel {
  void operator()(const MseSamples& t, int64_t begin, int64_t end, double* partials) const {
    Scratch scratch[2];
    const int64_t chunks = mse_chunks(t);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk % chunks * kMseChunk,
                    last = std::min(first + kMseChunk, t.elements);
      alignas(64) double lane[kLanes] = {};
      for (int64_t i = first; i < last; i += kTile) {
        const int64_t n = std::min(kTile, last - i), at = chunk / chunks * t.elements + i;
        const float* prediction = load_tile(t.prediction, t.dtype, at, n, scratch[0]);  // [n]
        const float* target = load_tile(t.target, t.dtype, at, n, scratch[1]);          // [n]
        add_lanes(
            lane, n, nullptr, [=](int64_t j) { prefetch(j, prediction, target); },
            [=](int64_t j, bool) { return squared_error_one(prediction[j], target[j]); });
      }
      partials[chunk] = sum_of(lane);
    }
  }
};

struct BackwardKernel {
  void operator()(const MseSamples& t, int64_t begin, int64_t end, const float* sample_weights,
                  void* gradient) const {
    Scratch scratch[3];
    const int64_t chunks = mse_chunks(t);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk % chunks * kMseChunk,
                    last = std::min(first + kMseChunk, t.elements);
      const float weight = sample_weights[chunk / chunks];
      for (int64_t i = first; i < last; i += kTile) {
        const int64_t n = std::min(kTile, last - i), at = chunk / chunks * t.elements + i;
        const float* prediction = load_tile(t.prediction, t.dtype, at, n, scratch[0]);  // [n]
        const float* target = load_tile(t.target, t.dtype, at, n, scratch[1]);          // [n]
        float* out = open_tile(gradient, t.dtype, at, scratch[2]);                      // [n]
        each_lane(
            n, nullptr, [=](int64_t j) { prefetch(j, prediction, target); },
            [=](int64_t j, bool) { out[j] = mse_backward_one(prediction[j], target[j], weight); });
        store_tile(gradient, t.dtype, at, n, out);
      }
    }
  }
};

}  // namespace

void adaptive_mse_cpu(const MseSamples& t, int64_t begin, int64_t end, double* partials) {
  run_isa(ForwardKernel{}, t, begin, end, partials);
}

void adaptive_mse_backward_cpu(const MseSamples& t, int64_t begin, int64_t end,
                               const float* sample_weights, void* gradient) {
  run_isa(BackwardKernel{}, t, begin, end, sample_weights, gradient);
}

}  // namespace sfron
