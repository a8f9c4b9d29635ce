#include "adamw_step/adamw_step.h"

#include "cpu/compact.h"
#include "cpu/elements.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/runs.h"
#include "cpu/step.h"
#include "formulas/flags.h"

namespace sfron {
namespace {

// Maxima are rounded to nearest where averages are dithered.
template <class S>
using Maxima = std::conditional_t<std::is_same_v<S, Direct<DitheredCell>>, Direct<BFloat16Cell>, S>;

constexpr int64_t kFar = 1 << 17;  // elements; moments and all of fewer may stay in a cache

bool fetches_ahead(const AdamwTensor& t) {
  return kFetchAhead || (kFetchManyAhead && t.numel > kFar);
}

template <class... Streams>
SFRON_HD void prefetch_all(int64_t i, const Streams&... streams) {
  (prefetch_lines(streams.address() + i + kAhead), ...);
}

template <bool kAmsgrad, bool kSlowFrom>
struct AdamwKernel {
  // P, S: how parameters and moments are seen.
  template <class P, class S>
  void operator()(As<P> p, As<S> state, const AdamwTensor& t, int64_t begin, int64_t end,
                  AdamwScalars s) const {
    if (s.l2 || s.freeze || s.avg.from_end || kAmsgrad)
      return run<true>(p, state, t, begin, end, s);
    s.l2 = s.freeze = s.avg.from_end = false;  // as constants, which cost nothing
    t.mask == nullptr ? run<false>(p, state, t, begin, end, s)
                      : run<true>(p, state, t, begin, end, s);
  }

 private:
  template <bool kMasked, class P, class S>
  SFRON_HD void run(As<P>, As<S>, const AdamwTensor& t, int64_t begin, int64_t end,
                    AdamwScalars s) const {
    using Grad = typename P::Whole;
    Scratch scratch[6];
    const WeightCorrections& c = t.corrections;
    const float scale = t.scale, eps = t.eps;
    const int64_t step = static_cast<int64_t>(*t.step);
    const bool ahead = fetches_ahead(t);
    for (int64_t at = begin; at < end; at += kTile) {
      const int64_t n = std::min(kTile, end - at);
      const Dither dither(at, step);
      const SlowCopy slow_save(t.slow_save, t.param, t.dtype, at, n, t.numel);
      save_corrections(c, at, n);
      const uint8_t* mask = mask_tile(t.mask, at);                   // [ceil(n / 8)]
      const P param(t.param, t.dtype, c.param, at, n, scratch[0]);   // [n]
      const Grad grad(t.grad, t.dtype, nullptr, at, n, scratch[1]);  // [n]
      const P slow(kSlowFrom ? t.slow_from : nullptr, t.dtype, c.slow_from, at, n,
                   scratch[2]);                                            // [n]
      const S m(t.exp_avg, t.state_dtype, nullptr, at, n, scratch[3]);     // [n]
      const S v(t.exp_avg_sq, t.state_dtype, nullptr, at, n, scratch[4]);  // [n]
      const Maxima<S> w(kAmsgrad ? t.max_exp_avg_sq : nullptr, t.state_dtype, nullptr, at, n,
                        scratch[5]);  // [n]
      const auto before = [=](int64_t i) {
        if (ahead) prefetch_all(i, param, grad, m, v);
        if (ahead && kAmsgrad) prefetch_all(i, w);
        if (ahead && kSlowFrom) prefetch_all(i, slow);
        slow_save.block(i);
      };
      const auto one = [=](const AdamwElement& old, float g, float from, bool of_mask) {
        AdamwElement e = adamw_one<kAmsgrad>(old, g, !kMasked || of_mask, scale, eps, s);
        if (kSlowFrom) e.param = lerp_one(from, e.param, s.slow);
        return e;
      };
      const auto each = [=](int64_t i, bool of_mask) {
        const AdamwElement old{param.get(i), m.get(i), v.get(i), kAmsgrad ? w.get(i) : 0.0f};
        const AdamwElement e = one(old, grad.get(i), kSlowFrom ? slow.get(i) : 0.0f, of_mask);
        const uint32_t threshold = dither.of(i);
        param.set(i, e.param, threshold);
        m.set(i, e.exp_avg, threshold);
        v.set(i, e.exp_avg_sq, threshold);
        if (kAmsgrad) w.set(i, e.max_exp_avg_sq, threshold);
      };
      if constexpr (kPairs<P, S>) {
        const auto both = [=](int64_t i, bool of_mask, bool next_of_mask) {
          const Pair none{}, p = param.pair(i), g = grad.pair(i), m2 = m.pair(i), v2 = v.pair(i);
          const Pair w2 = kAmsgrad ? w.pair(i) : none, from = kSlowFrom ? slow.pair(i) : none;
          const AdamwElement e = one({p.low, m2.low, v2.low, w2.low}, g.low, from.low, of_mask);
          const AdamwElement f =
              one({p.high, m2.high, v2.high, w2.high}, g.high, from.high, next_of_mask);
          param.set_pair(i, {e.param, f.param});
          m.set_pair(i, {e.exp_avg, f.exp_avg});
          v.set_pair(i, {e.exp_avg_sq, f.exp_avg_sq});
          if (kAmsgrad) w.set_pair(i, {e.max_exp_avg_sq, f.max_exp_avg_sq});
        };
        each_pair(n, mask, before, both, each);
      } else {
        each_lane(n, mask, before, each);
      }
      m.store(dither);
      v.store(dither);
      if (kAmsgrad) w.store(dither);
      param.store(dither);
    }
  }
};

// Moments in codes, a group at a time. This waits for the arithmetic and not for the memory:
// several short loops, of which a processor has more iterations under way than of a long one, and
// the root in another than the division, which wait for each other.
template <bool kSlowFrom>
struct CodedAdamwKernel {
  template <class P>
  void operator()(As<P> as, const AdamwTensor& t, int64_t begin, int64_t end,
                  AdamwScalars s) const {
    if (s.l2 || s.freeze || s.avg.from_end) return run(as, t, begin, end, s);
    s.l2 = s.freeze = s.avg.from_end = false;  // as constants, which cost nothing
    run(as, t, begin, end, s);
  }

 private:
  template <class P>
  SFRON_HD void run(As<P>, const AdamwTensor& t, int64_t begin, int64_t end, AdamwScalars s) const {
    using Grad = typename P::Whole;
    Scratch scratch[7];
    const WeightCorrections& c = t.corrections;
    const float scale = t.scale, eps = t.eps;
    const int64_t step = static_cast<int64_t>(*t.step);
    const bool ahead = fetches_ahead(t);
    Groups groups({t.scales, t.row, 2}, begin);
    for (int64_t at = begin, n = 0; at < end; at += n) {
      n = groups.next();
      const Dither dither(at, step);
      const SlowCopy slow_save(t.slow_save, t.param, t.dtype, at, n, t.numel);
      save_corrections(c, at, n);
      const P param(t.param, t.dtype, c.param, at, n, scratch[0]);   // [n]
      const Grad grad(t.grad, t.dtype, nullptr, at, n, scratch[1]);  // [n]
      const P slow(kSlowFrom ? t.slow_from : nullptr, t.dtype, c.slow_from, at, n,
                   scratch[2]);                                                // [n]
      const Codes<true> m(t.exp_avg, groups.scale(0), at, n, scratch[3]);      // [n]
      const Codes<false> v(t.exp_avg_sq, groups.scale(1), at, n, scratch[4]);  // [n]
      float *lanes = scratch[5], *divisors = scratch[6];                       // [n]
      if (ahead || slow_save.copies()) {
        for (int64_t i = 0; i < n; i += kLanes) {
          if (ahead) prefetch_all(i, param, grad, m, v);
          if (ahead && kSlowFrom) prefetch_all(i, slow);
          slow_save.block(i);
        }
      }
      spread_mask(n, mask_tile(t.mask, at), lanes);
      int32_t most_m = 0, most_v = 0;
      SFRON_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        const bool selected = bits_of(lanes[i]) != 0;
        const AdamwElement old{param.get(i), m.get(i), v.get(i), 0.0f};
        const AdamwElement e = adamw_averages(old, grad.get(i), selected, s);
        const uint32_t write = adamw_writes(selected, s);
        const float avg = choose(write, e.exp_avg, old.exp_avg),
                    square = choose(write, e.exp_avg_sq, old.exp_avg_sq);
        m.set(i, avg);
        v.set(i, square);
        most_m = std::max(most_m, size_bits(avg));
        most_v = std::max(most_v, size_bits(square));
        divisors[i] = adamw_divisor(square, eps);
      }
      SFRON_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t write = adamw_writes(bits_of(lanes[i]) != 0, s);
        const float old = param.get(i);
        const float x = choose(write, adamw_updated(old, m.value(i), divisors[i], scale, s), old);
        param.set(i, kSlowFrom ? lerp_one(slow.get(i), x, s.slow) : x, dither.of(i));
      }
      param.store(dither);
      const float inverse_m = m.inverse_for(most_m), inverse_v = v.inverse_for(most_v);
      SFRON_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t threshold = dither.of(i);
        m.encode(i, inverse_m, threshold);
        v.encode(i, inverse_v, threshold);
      }
      m.store();
      v.store();
    }
  }
};

}  // namespace

void adamw_step_cpu(const std::vector<AdamwTensor>& tensors, const Runs& runs, int64_t begin,
                    int64_t end, const AdamwScalars& s) {
  if (tensors.empty()) return;
  if (s.skip) return skip_step(tensors, runs, begin, end, s.slow);
  const auto& one = first_filled(tensors);
  with_flags(
      one.max_exp_avg_sq != nullptr, one.slow_from != nullptr, [&](auto amsgrad, auto slow_from) {
        walk_step(
            tensors, runs, begin, end, s.measured, [&](int64_t i, int64_t first, int64_t last) {
              const AdamwTensor& t = tensors[i];
              Scales{t.scales, t.row, 2}.whole_groups(&first, &last);
              if (t.scales != nullptr) {  // then there are no maxima
                return with_tiled_weights(t.corrections, [&](auto param) {
                  run_isa(CodedAdamwKernel<slow_from>{}, param, t, first, last, s);
                });
              }
              const bool converts = t.dtype != DType::kFloat32 || t.state_dtype != DType::kFloat32;
              with_weights(t.dtype, t.corrections, t.state_dtype, [&](auto p, auto state) {
                const AdamwKernel<amsgrad, slow_from> kernel;
                run_streaming(converts, kernel, p, state, t, first, last, s);
              });
            });
      });
}

}  // namespace sfron
