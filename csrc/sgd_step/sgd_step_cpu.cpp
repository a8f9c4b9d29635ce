#include "sgd_step/sgd_step.h"

#include "cpu/compact.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/runs.h"
#include "cpu/step.h"
#include "cpu/tiles.h"
#include "formulas/flags.h"

namespace sfron {
namespace {

template <bool kMomentum, bool kSlowFrom>
struct SgdKernel {
  // P, S: how parameters and momentum are seen.
  template <class P, class S>
  void operator()(As<P> p, As<S> state, const SgdTensor& t, int64_t begin, int64_t end,
                  SgdScalars s) const {
    if (s.first || s.nesterov || s.freeze) return run<true>(p, state, t, begin, end, s);
    s.first = s.nesterov = s.freeze = false;  // as constants, which cost nothing
    t.mask == nullptr ? run<false>(p, state, t, begin, end, s)
                      : run<true>(p, state, t, begin, end, s);
  }

 private:
  template <bool kMasked, class P, class S>
  SFRON_HD void run(As<P>, As<S>, const SgdTensor& t, int64_t begin, int64_t end,
                    SgdScalars s) const {
    using Grad = typename P::Whole;
    Scratch scratch[4];
    const WeightCorrections& c = t.corrections;
    const int64_t step = t.step == nullptr ? 0 : static_cast<int64_t>(*t.step);
    for (int64_t at = begin; at < end; at += kTile) {
      const int64_t n = std::min(kTile, end - at);
      const Dither dither(at, step);
      const SlowCopy slow_save(t.slow_save, t.param, t.dtype, at, n, t.numel);
      save_corrections(c, at, n);
      const uint8_t* mask = mask_tile(t.mask, at);                   // [ceil(n / 8)]
      const P param(t.param, t.dtype, c.param, at, n, scratch[0]);   // [n]
      const Grad grad(t.grad, t.dtype, nullptr, at, n, scratch[1]);  // [n]
      const S m(kMomentum ? t.momentum : nullptr, t.momentum_dtype, nullptr, at, n,
                scratch[2]);  // [n]
      const P slow(kSlowFrom ? t.slow_from : nullptr, t.dtype, c.slow_from, at, n,
                   scratch[3]);  // [n]
      const auto before = [=](int64_t i) {
        prefetch(i, param.address(), grad.address());
        if (kMomentum) prefetch(i, m.address());
        if (kSlowFrom) prefetch(i, slow.address());
        slow_save.block(i);
      };
      const auto one = [=](SgdElement e, float g, float from, bool of_mask) {
        const bool selected = !kMasked || of_mask;
        if (kMomentum) {
          e = sgd_momentum_one(e, g, selected, s);
        } else {
          e.param = sgd_one(e.param, g, selected, s);
        }
        if (kSlowFrom) e.param = lerp_one(from, e.param, s.slow);
        return e;
      };
      const auto each = [=](int64_t i, bool of_mask) {
        const SgdElement old{param.get(i), kMomentum ? m.get(i) : 0.0f};
        const SgdElement e = one(old, grad.get(i), kSlowFrom ? slow.get(i) : 0.0f, of_mask);
        if (kMomentum) m.set(i, e.momentum, 0);
        param.set(i, e.param, dither.of(i));
      };
      if constexpr (kPairs<P, S>) {
        const auto both = [=](int64_t i, bool of_mask, bool next_of_mask) {
          const Pair none{}, p = param.pair(i), g = grad.pair(i);
          const Pair m2 = kMomentum ? m.pair(i) : none, from = kSlowFrom ? slow.pair(i) : none;
          const SgdElement e = one({p.low, m2.low}, g.low, from.low, of_mask),
                           f = one({p.high, m2.high}, g.high, from.high, next_of_mask);
          if (kMomentum) m.set_pair(i, {e.momentum, f.momentum});
          param.set_pair(i, {e.param, f.param});
        };
        each_pair(n, mask, before, both, each);
      } else {
        each_lane(n, mask, before, each);
      }
      if (kMomentum) m.store();
      param.store(dither);
    }
  }
};

// Momentum in codes, a group at a time, as CodedAdamwKernel.
template <bool kSlowFrom>
struct CodedSgdKernel {
  template <class P>
  void operator()(As<P>, const SgdTensor& t, int64_t begin, int64_t end, SgdScalars s) const {
    using Grad = typename P::Whole;
    Scratch scratch[5];
    const WeightCorrections& c = t.corrections;
    const int64_t step = static_cast<int64_t>(*t.step);
    Groups groups({t.scales, t.row, 1}, begin);
    for (int64_t at = begin, n = 0; at < end; at += n) {
      n = groups.next();
      const Dither dither(at, step);
      const SlowCopy slow_save(t.slow_save, t.param, t.dtype, at, n, t.numel);
      save_corrections(c, at, n);
      const Grad grad(t.grad, t.dtype, nullptr, at, n, scratch[1]);         // [n]
      const P param(t.param, t.dtype, c.param, at, n, scratch[0]);          // [n]
      const Codes<true> m(t.momentum, groups.scale(0), at, n, scratch[2]);  // [n]
      const P slow(kSlowFrom ? t.slow_from : nullptr, t.dtype, c.slow_from, at, n,
                   scratch[3]);   // [n]
      float* lanes = scratch[4];  // [n]
      if (kFetchAhead || slow_save.copies()) {
        for (int64_t i = 0; i < n; i += kLanes) {
          prefetch(i, param.address(), grad.address(), m.address());
          if (kSlowFrom) prefetch(i, slow.address());
          slow_save.block(i);
        }
      }
      spread_mask(n, mask_tile(t.mask, at), lanes);
      int32_t most = 0;
      SFRON_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        const SgdElement old{param.get(i), m.get(i)};
        const SgdElement e = sgd_momentum_one(old, grad.get(i), bits_of(lanes[i]) != 0, s);
        m.set(i, e.momentum);
        most = std::max(most, size_bits(e.momentum));
        const float x = kSlowFrom ? lerp_one(slow.get(i), e.param, s.slow) : e.param;
        param.set(i, x, dither.of(i));
      }
      param.store(dither);
      const float inverse = m.inverse_for(most);
      SFRON_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) m.encode(i, inverse, dither.of(i));
      m.store();
    }
  }
};

}  // namespace

void sgd_step_cpu(const std::vector<SgdTensor>& tensors, const Runs& runs, int64_t begin,
                  int64_t end, const SgdScalars& s) {
  if (tensors.empty()) return;
  if (s.skip) {
    if (s.first) {
      runs.walk(begin, end, [&](int64_t i, int64_t first, int64_t last) {
        const SgdTensor& t = tensors[i];
        if (t.momentum == nullptr) return;
        if (t.scales == nullptr) {
          zero_tile(t.momentum, t.momentum_dtype, first, last - first);
        } else {
          std::memset(static_cast<char*>(t.momentum) + first, 0, last - first);
        }
      });
    }
    return skip_step(tensors, runs, begin, end, s.slow);
  }
  const auto& one = first_filled(tensors);
  const auto run = [&](auto momentum, auto slow_from) {
    walk_step(tensors, runs, begin, end, s.measured, [&](int64_t i, int64_t first, int64_t last) {
      const SgdTensor& t = tensors[i];
      Scales{t.scales, t.row, 1}.whole_groups(&first, &last);
      if constexpr (momentum) {
        if (t.scales != nullptr) {
          return with_tiled_weights(t.corrections, [&](auto param) {
            run_isa(CodedSgdKernel<slow_from>{}, param, t, first, last, s);
          });
        }
      }
      const DType state = momentum ? t.momentum_dtype : t.dtype;
      const bool converts = t.dtype != DType::kFloat32 || state != DType::kFloat32;
      with_tiled_weights(t.dtype, t.corrections, state, [&](auto p, auto m) {
        run_streaming(converts, SgdKernel<momentum, slow_from>{}, p, m, t, first, last, s);
      });
    });
  };
  with_flags(one.momentum != nullptr, one.slow_from != nullptr, run);
}

}  // namespace sfron
