#pragma once
// The loops of a kernel over the elements of one unit: `sweep` gives each lane its groups, and
// `each_group` takes them, several at a time.
#include <cstdint>

#include "cuda/group.cuh"
#include "cuda/table.cuh"

namespace sfron {

// How a lane holds elements: groups of kCount parameters E and of their states S.
template <class E, class S, int kCount>
struct Held {};

// The lane's groups `at`, `at` + a warp's stride, ... below `stop`, kUnroll at a time: load(u, e)
// for all of them, so that they are in flight together, then use(u, e) for those before the end. u
// counts from 0 to kUnroll, e is the first element of the group.
template <int kCount, int kUnroll, class Load, class Use>
__device__ __forceinline__ void each_group(int64_t at, int64_t stop, const Load& load,
                                           const Use& use) {
  constexpr int64_t kStride = kWarp * kCount;
#pragma unroll 1
  for (; at < stop; at += kUnroll * kStride) {
    // Beyond the end the first group again, and unused: a load without a condition needs no
    // register before it.
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t e = at + u * kStride;
      load(u, e < stop ? e : at);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t e = at + u * kStride;
      if (e < stop) use(u, e);
    }
  }
}

// Elements [begin, end) by one warp: run(Held, first, stop) of this lane over whole groups, if the
// pointers are aligned, and over the rest as single elements. Units begin at multiples of every
// group, so no head is needed: a pointer is at a multiple of 16 bytes for the whole tensor or, by
// singles that still coalesce, for none of it.
template <class Run>
__device__ __forceinline__ void sweep(int64_t begin, int64_t end, DType param, DType state,
                                      bool are_aligned, const Run& run) {
  const int lane = threadIdx.x % kWarp;
  // singles within each branch, too: the compiler then knows their dtypes
  dispatch(param, state, [&](auto e, auto s) {
    using E = decltype(e);
    using S = decltype(s);
    constexpr int kGroup = kGroupOf<E, S>;
    int64_t rest = begin;
    if (are_aligned) {
      rest = end - (end - begin) % kGroup;
      run(Held<E, S, kGroup>{}, begin + lane * kGroup, rest);
    }
    if (rest < end) run(Held<AnyElement, AnyElement, 1>{}, rest + lane, end);
  });
}

}  // namespace sfron
