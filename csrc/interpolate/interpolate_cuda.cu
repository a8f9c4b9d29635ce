#include "interpolate/interpolate.h"

#include "cuda/group.cuh"
#include "cuda/launch.cuh"
#include "cuda/sweep.cuh"
#include "cuda/table.cuh"

namespace sfron {
namespace {

constexpr int kUnroll = 4;  // two streams of four 16-byte loads hide the latency
// Blocks per processor, hence at most 64 registers, or 80, as Blackwell's code needs a few more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kResident = 3;
#else
constexpr int kResident = 4;
#endif

template <class E, class S, int kCount>
__device__ __forceinline__ void interpolate_groups(Held<E, S, kCount>, const InterpolateTensor& t,
                                                   int64_t at, int64_t stop, Lerp s) {
  Group<E, kCount> slow[kUnroll], fast[kUnroll];
  each_group<kCount, kUnroll>(
      at, stop,
      [&](int u, int64_t e) {
        slow[u].load(t.slow, t.dtype, e);
        fast[u].load(t.fast, t.dtype, e);
      },
      [&](int u, int64_t e) {
#pragma unroll
        for (int k = 0; k < kCount; ++k)
          slow[u].set(k, interpolate_one(slow[u].get(k), fast[u].get(k), s));
        slow[u].store(t.slow, e);
        slow[u].store(t.fast, e);
      });
}

__global__ void __launch_bounds__(kBlock, kResident)
    interpolate_kernel(const __grid_constant__ List<InterpolateTensor> list, Number slow_lr) {
  const Lerp s = make_lerp(value_of(slow_lr));
  each_unit(list, [&](const InterpolateTensor t, int64_t, int64_t begin, int64_t end) {
    sweep(begin, end, t.dtype, t.dtype, all_aligned(t.slow, t.fast),
          [&](auto held, int64_t at, int64_t stop) { interpolate_groups(held, t, at, stop, s); });
  });
}

}  // namespace

void launch_interpolate(const std::vector<InterpolateTensor>& tensors, const Number& slow_lr,
                        const Queue& queue) {
  static TableCache tables("interpolate_", interpolate_kernel);
  if (any_filled(tensors)) tables.launch(interpolate_kernel, tensors, queue, slow_lr);
}

}  // namespace sfron
