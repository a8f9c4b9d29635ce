#pragma once
// What the optimizer steps share on the CPU: the slow weights, which a cycle's first step writes
// and its last reads, and the way over the list.
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <vector>

#include "cpu/compact.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/runs.h"
#include "cpu/tiles.h"

namespace sfron {

// Copies a tile block by block, just before the step changes the block. What is not read soon goes
// around the cache if the tensor is large, because a line that is only written would first be read.
// end_stream() after the last one.
class SlowCopy {
 public:
  // Elements; what is smaller may well stay in the cache.
  static constexpr int64_t kStreamed = 1 << 16;

  // Elements [at, at + n) of two tensors [numel]; `to` may be null: nothing is copied. What no
  // block covers goes first.
  SFRON_HD SlowCopy(void* to, const void* from, DType dtype, int64_t at, int64_t n, int64_t numel)
      : bytes_(dtype_bytes(dtype)), from_(static_cast<const char*>(from) + at * bytes_) {
    if (to == nullptr) return;
    to_ = static_cast<char*>(to) + at * bytes_;
    streams_ = numel >= kStreamed && reinterpret_cast<uintptr_t>(to_) % 16 == 0;
    const int64_t whole = n / kLanes * kLanes * bytes_;
    std::memcpy(to_ + whole, from_ + whole, n * bytes_ - whole);
  }

  SFRON_HD bool copies() const { return to_ != nullptr; }

  // Elements [i, i + kLanes).
  SFRON_HD void block(int64_t i) const {
    if (to_ == nullptr) return;
    half(i * bytes_);
    if (bytes_ == 4) half(i * bytes_ + kHalf);
  }

 private:
  static constexpr int64_t kHalf = kLanes * 2;  // bytes

  SFRON_HD void half(int64_t offset) const {
#if defined(__SSE2__)
    if (streams_) {
      for (int64_t at = offset; at < offset + kHalf; at += 16) {
        const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from_ + at));
        _mm_stream_si128(reinterpret_cast<__m128i*>(to_ + at), values);
      }
      return;
    }
#endif
    std::memcpy(to_ + offset, from_ + offset, kHalf);
  }

  int64_t bytes_;  // of an element
  const char* from_;
  char* to_ = nullptr;
  bool streams_ = false;
};

inline void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

struct SkipKernel {
  template <class P, class TensorArgs>
  void operator()(As<P>, const TensorArgs& t, int64_t begin, int64_t end, Lerp s) const {
    Scratch scratch[2];
    const WeightCorrections& c = t.corrections;
    // a skipped step is not counted, but its rounding is its own
    const int64_t step = t.step == nullptr ? 0 : static_cast<int64_t>(*t.step) + 1;
    for (int64_t at = begin; at < end; at += kTile) {
      const int64_t n = std::min(kTile, end - at);
      const SlowCopy slow_save(t.slow_save, t.param, t.dtype, at, n, t.numel);
      for (int64_t i = 0; i + kLanes <= n; i += kLanes) slow_save.block(i);
      save_corrections(c, at, n);
      if (t.slow_from == nullptr) continue;
      const P param(t.param, t.dtype, c.param, at, n, scratch[0]);         // [n]
      const P slow(t.slow_from, t.dtype, c.slow_from, at, n, scratch[1]);  // [n]
      const Dither dither(at, step);
      each_lane(
          n, nullptr, [=](int64_t i) { prefetch(i, param.address(), slow.address()); },
          [=](int64_t i, bool) {
            param.set(i, lerp_one(slow.get(i), param.get(i), s), dither.of(i));
          });
      param.store(dither);
    }
  }
};

// What a skipped step still does: the slow weights are kept, and interpolated from.
template <class TensorArgs>
void skip_step(const std::vector<TensorArgs>& tensors, const Runs& runs, int64_t begin, int64_t end,
               Lerp s) {
  runs.walk(begin, end, [&](int64_t i, int64_t first, int64_t last) {
    with_tiled_weights(tensors[i].corrections, [&](auto param) {
      run_isa(SkipKernel{}, param, tensors[i], first, last, s);
    });
  });
  end_stream();
}

// Calls f(tensor, begin, end) for each stretch of elements in units [begin, end). `measured`: the
// norm has just read the gradients; the last of them are still in the cache, so they come first.
template <class TensorArgs, class F>
void walk_step(const std::vector<TensorArgs>& tensors, const Runs& runs, int64_t begin, int64_t end,
               bool measured, const F& f) {
  const auto ahead = [&](size_t i) {
    prefetch_start(tensors[i].param);
    prefetch_start(tensors[i].grad);
  };
  measured ? runs.walk_back(begin, end, f, ahead) : runs.walk(begin, end, f, ahead);
  end_stream();
}

}  // namespace sfron
