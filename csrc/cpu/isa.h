#pragma once
// One source, three instruction sets. `run_isa(kernel, args...)` calls the kernel through a wrapper
// that is compiled for the best level this processor has; `flatten` inlines the kernel into the
// wrapper, so the loops inside are vectorised for that level. Results are the same bits at every
// level: no contraction, fixed-order sums.
#include <utility>

namespace sfron {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// Chosen once per process; SFRON_FAST_ISA=baseline|avx2|avx512 forces a level (the tests compare
// them).
Isa isa();

// For kernels that do little but stream: on a Zen 4 they are some per cent faster with vectors of
// 256 bits than of 512, on a Zen 5 a third with one thread.
Isa streaming_isa();

// Whether to prefetch and to interleave streams in software. Measured: a Xeon gains a fifth from
// it; on a Zen 4 it throws the hardware's own prefetchers off, which costs a tenth, and a third of
// the norm. No result depends on it.
extern const bool kFetchAhead;

// The same for a loop over four streams or more of a tensor that no cache holds: with one thread a
// Zen 5 gains a tenth from it; with two, when memory is busy, nothing.
extern const bool kFetchManyAhead;

#if defined(__x86_64__) && defined(__GNUC__)
#define SFRON_AVX2_TARGET "avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt"
#define SFRON_AVX512_TARGET SFRON_AVX2_TARGET ",avx512f,avx512bw,avx512cd,avx512dq,avx512vl"
#if !defined(__clang__)
#define SFRON_WIDTH ",prefer-vector-width=512"
#else
#define SFRON_WIDTH ""
#endif

template <class Kernel, class... Args>
__attribute__((target(SFRON_AVX2_TARGET), flatten, noinline)) void run_avx2(const Kernel& kernel,
                                                                            const Args&... args) {
  kernel(args...);
}

template <class Kernel, class... Args>
__attribute__((target(SFRON_AVX512_TARGET SFRON_WIDTH), flatten, noinline)) void run_avx512(
    const Kernel& kernel, const Args&... args) {
  kernel(args...);
}
#endif

template <class Kernel, class... Args>
void run_at([[maybe_unused]] Isa level, const Kernel& kernel, const Args&... args) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level == Isa::kAvx512) return run_avx512(kernel, args...);
  if (level == Isa::kAvx2) return run_avx2(kernel, args...);
#endif
  kernel(args...);
}

template <class Kernel, class... Args>
void run_isa(const Kernel& kernel, const Args&... args) {
  run_at(isa(), kernel, args...);
}

// Elements that are converted take arithmetic, for which vectors of 512 bits are twice as fast.
template <class Kernel, class... Args>
void run_streaming(bool converts, const Kernel& kernel, const Args&... args) {
  run_at(converts ? isa() : streaming_isa(), kernel, args...);
}

}  // namespace sfron
