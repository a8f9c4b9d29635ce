#include "sgd_step/sgd_step.h"

#include "cuda/group.cuh"
#include "cuda/launch.cuh"
#include "cuda/sweep.cuh"
#include "cuda/table.cuh"

namespace sfron {
namespace {

// Blocks per processor, hence at most 64 or 80 registers: four streams need 80, and Blackwell's
// code for three of them too.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kThreeStreams = 3;
#else
constexpr int kThreeStreams = 4;
#endif
template <bool kMomentum, bool kSlowFrom>
constexpr int kResident = !kSlowFrom  ? 4
                          : kMomentum ? 3
                                      : kThreeStreams;

// E: dtype of the parameters, M: of their momentum. With kSlowFrom the result is interpolated from
// the slow weights.
template <bool kMomentum, bool kSlowFrom, class E, class M, int kCount>
__device__ __forceinline__ void sgd_groups(Held<E, M, kCount>, const SgdTensor& t, int64_t at,
                                           int64_t stop, const SgdScalars& s) {
  constexpr int kSingles = kMomentum && kSlowFrom ? 2 : 4;    // eight to twelve loads in flight
  constexpr int kVectors = kMomentum && kCount != 4 ? 1 : 2;  // four to eight of 16 bytes
  constexpr int kUnroll = kCount == 1 ? kSingles : kVectors;
  Group<E, kCount> param[kUnroll], grad[kUnroll], slow[kUnroll];
  Group<M, kCount> momentum[kUnroll];
  uint32_t bits[kUnroll];
  each_group<kCount, kUnroll>(
      at, stop,
      [&](int u, int64_t e) {
        param[u].load(t.param, t.dtype, e);
        grad[u].load(t.grad, t.dtype, e);
        if constexpr (kMomentum) momentum[u].load(t.momentum, t.momentum_dtype, e);
        if constexpr (kSlowFrom) slow[u].load(t.slow_from, t.dtype, e);
        bits[u] = mask_bits(t.mask, e);
      },
      [&](int u, int64_t e) {
        if (t.slow_save != nullptr) param[u].store(t.slow_save, e);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          const bool selected = (bits[u] >> k & 1) != 0;
          float p = param[u].get(k);
          if constexpr (kMomentum) {
            const float m = momentum[u].get(k);
            const SgdElement updated = sgd_momentum_one({p, m}, grad[u].get(k), selected, s);
            momentum[u].set(k, !s.skip ? updated.momentum : s.first ? 0.0f : m);
            p = s.skip ? p : updated.param;
          } else {
            p = s.skip ? p : sgd_one(p, grad[u].get(k), selected, s);
          }
          if constexpr (kSlowFrom) p = lerp_one(slow[u].get(k), p, s.slow);
          param[u].set(k, p);
        }
        if constexpr (kMomentum) momentum[u].store(t.momentum, e);
        param[u].store(t.param, e);
      });
}

template <bool kMomentum, bool kSlowFrom>
__global__ void __launch_bounds__(kBlock, (kResident<kMomentum, kSlowFrom>))
    sgd_step_kernel(const __grid_constant__ List<SgdTensor> list, SgdOptions options,
                    StepInputs inputs, bool slow_save) {
  const SgdScalars s = sgd_scalars(options, step_numbers(inputs), step_state(inputs));
  if (blockIdx.x == 0 && threadIdx.x == 0) count_skip(inputs, s.skip);
  if (s.skip && !kSlowFrom && !slow_save && !(kMomentum && s.first)) return;
  each_unit(list, [&](const SgdTensor t, int64_t, int64_t begin, int64_t end) {
    const DType state = kMomentum ? t.momentum_dtype : t.dtype;
    sweep(begin, end, t.dtype, state,
          all_aligned(t.param, t.grad, t.momentum, t.slow_save, t.slow_from),
          [&](auto held, int64_t at, int64_t stop) {
            sgd_groups<kMomentum, kSlowFrom>(held, t, at, stop, s);
          });
  });
}

}  // namespace

void launch_sgd_step(const std::vector<SgdTensor>& tensors, const SgdOptions& options,
                     const StepInputs& inputs, const Queue& queue) {
  static TableCache tables("sgd_step_", sgd_step_kernel<false, false>, sgd_step_kernel<false, true>,
                           sgd_step_kernel<true, false>, sgd_step_kernel<true, true>);
  if (tensors.empty()) return;
  const SgdTensor& one = first_filled(tensors);
  // all tensors have them, or none
  const bool momentum = one.momentum != nullptr;
  const bool slow_from = one.slow_from != nullptr;
  const auto run = [&](auto has_momentum, auto has_slow_from) {
    constexpr bool kMomentum = has_momentum, kSlowFrom = has_slow_from;
    tables.launch(sgd_step_kernel<kMomentum, kSlowFrom>, tensors, queue, options, inputs,
                  one.slow_save != nullptr);
  };
  with_flags(momentum, slow_from, run);
}

}  // namespace sfron
