#include "fisher_accumulate/fisher_accumulate.h"

#include "cuda/group.cuh"
#include "cuda/launch.cuh"
#include "cuda/sweep.cuh"
#include "cuda/table.cuh"

namespace sfron {
namespace {

constexpr int kResident = 4;  // blocks per processor, hence at most 64 registers

template <class E, class F, int kCount>
__device__ __forceinline__ void fisher_groups(Held<E, F, kCount>, const FisherTensor& t, int64_t at,
                                              int64_t stop, float weight) {
  constexpr int kUnroll = kCount == 8 ? 2 : 4;  // six or eight 16-byte loads in flight
  Group<F, kCount> fisher[kUnroll];
  Group<E, kCount> grad[kUnroll];
  each_group<kCount, kUnroll>(
      at, stop,
      [&](int u, int64_t e) {
        fisher[u].load(t.fisher, DType::kFloat32, e);
        grad[u].load(t.grad, t.dtype, e);
      },
      [&](int u, int64_t e) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          fisher[u].set(k, fisher_accumulate_one(fisher[u].get(k), grad[u].get(k), weight));
        }
        fisher[u].store(t.fisher, e);
      });
}

__global__ void __launch_bounds__(kBlock, kResident)
    fisher_accumulate_kernel(const __grid_constant__ List<FisherTensor> list, Number number) {
  const float weight = static_cast<float>(value_of(number));
  each_unit(list, [&](const FisherTensor t, int64_t, int64_t begin, int64_t end) {
    sweep(begin, end, t.dtype, DType::kFloat32, all_aligned(t.fisher, t.grad),
          [&](auto held, int64_t at, int64_t stop) { fisher_groups(held, t, at, stop, weight); });
  });
}

}  // namespace

void launch_fisher_accumulate(const std::vector<FisherTensor>& tensors, const Number& weight,
                              const Queue& queue) {
  static TableCache tables("fisher_accumulate_", fisher_accumulate_kernel);
  if (any_filled(tensors)) tables.launch(fisher_accumulate_kernel, tensors, queue, weight);
}

}  // namespace sfron
