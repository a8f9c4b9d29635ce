#include "interpolate/interpolate.h"

#include "common/group.cuh"
#include "common/plan.cuh"
#include "common/table.cuh"

namespace sfron {
namespace {

constexpr int kUnroll = 4;    // two streams of four 16-byte loads hide the latency
constexpr int kResident = 4;  // blocks per processor, hence at most 64 registers

// Groups of kCount elements E at `at`, `at` + stride, ... below `stop`: all loads first, then the arithmetic.
template <class E, int kCount>
__device__ __forceinline__ void interpolate_groups(const InterpolateTensor& t, int64_t at, int64_t stop, Lerp s) {
  constexpr int64_t kStride = kWarp * kCount;
#pragma unroll 1
  for (; at < stop; at += kUnroll * kStride) {
    Group<E, kCount> slow[kUnroll], fast[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t e = clamped(at, u * kStride, stop);
      slow[u].load(t.slow, t.dtype, e);
      fast[u].load(t.fast, t.dtype, e);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t e = at + u * kStride;
      if (e < stop) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) slow[u].set(k, interpolate_one(slow[u].get(k), fast[u].get(k), s));
        slow[u].store(t.slow, e);
        slow[u].store(t.fast, e);
      }
    }
  }
}

__global__ void __launch_bounds__(kBlock, kResident) interpolate_kernel(Table<InterpolateTensor> table, Number slow_lr) {
  const Lerp s = make_lerp(value_of(slow_lr));
  each_unit(table, [&](int64_t i, int64_t begin, int64_t end) {
    const InterpolateTensor t = table.tensors[i];
    dispatch(t.dtype, t.dtype, [&](auto e, auto) {
      using E = decltype(e);
      sweep(
          begin, end, kGroupOf<E>, all_aligned(t.slow, t.fast),
          [&](int64_t at, int64_t stop) { interpolate_groups<E, kGroupOf<E>>(t, at, stop, s); },
          [&](int64_t at, int64_t stop) { interpolate_groups<AnyElement, 1>(t, at, stop, s); });
    });
  });
}

}  // namespace

void launch_interpolate(const std::vector<InterpolateTensor>& tensors, const Number& slow_lr, const Queue& queue) {
  const char* const op = "interpolate_";
  static Plans plans(op);
  use_device(op, queue);
  const Table<InterpolateTensor> table = make_table(plans, tensors, queue);
  if (table.units == 0) return;
  launch(op, interpolate_kernel, blocks_for(op, interpolate_kernel, table.units, queue), queue, table, slow_lr);
}

}  // namespace sfron
