#include "linear_rows/linear_rows.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/row_blocks.h"
#include "cpu/tiles.h"

namespace sfron {
namespace {

struct LogSumsKernel {
  void operator()(const LogitTile& t, int64_t begin, int64_t end, float* maximum, float* others,
                  float* picked) const {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = t.values + row * t.columns;  // [columns]
      const int64_t label = label_column(t, row);
      if (label >= 0) picked[row] = x[label];
      RowSum sum{maximum[row], others[row]};
      for (int64_t at = 0; at < t.columns; at += kRowBlock) {
        const int64_t n = std::min(kRowBlock, t.columns - at);
        const char* next = reinterpret_cast<const char*>(x + at + n);
        add_block(sum, x + at, n, label - at, next, sizeof(float));
      }
      maximum[row] = sum.maximum;
      others[row] = static_cast<float>(sum.others);
    }
  }
};

template <bool kCapped>
struct GradientKernel {
  void operator()(const LogitTile& t, const TileGradient& g, int64_t begin, int64_t end) const {
    alignas(64) float scratch[kRowBlock];
    const float softcap = g.softcap;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t label = label_column(t, row);
      const float shift = g.shift[row], factor = g.factor[row];
      for (int64_t at = 0; at < t.columns; at += kRowBlock) {
        const int64_t n = std::min(kRowBlock, t.columns - at), first = row * t.columns + at;
        const float* x = t.values + first;                       // [n]
        float* out = open_tile(g.out, g.dtype, first, scratch);  // [n]
        const bool here = label >= at && label < at + n;
        float at_label = g.label[row];
        if (here && kCapped) at_label *= cap_slope(x[label - at], softcap);
        each_lane(
            n, nullptr, [=](int64_t i) { prefetch(i, x); },
            [=](int64_t i, bool) {
              const float value = linear_gradient_one(x[i], shift, factor);
              out[i] = kCapped ? value * cap_slope(x[i], softcap) : value;
            });
        if (here) out[label - at] = at_label;
        store_tile(g.out, g.dtype, first, n, out);
      }
    }
  }
};

}  // namespace

void linear_log_sums_cpu(const LogitTile& t, int64_t begin, int64_t end, float* maximum,
                         float* others, float* picked) {
  run_isa(LogSumsKernel{}, t, begin, end, maximum, others, picked);
}

void linear_gradient_cpu(const LogitTile& t, const TileGradient& g, int64_t begin, int64_t end) {
  if (g.softcap == 0.0f) {
    run_isa(GradientKernel<false>{}, t, g, begin, end);
  } else {
    run_isa(GradientKernel<true>{}, t, g, begin, end);
  }
}

}  // namespace sfron
