#include "sgd_step/sgd_step.h"

#include "cuda/compact.cuh"
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

// Weights in two pieces, momentum in codes.
template <bool kMomentum, bool kSlowFrom>
__device__ __forceinline__ void sgd_lane(const SgdTensor& t, const Lane& lane, int64_t group,
                                         int64_t step, const SgdScalars& s) {
  const WeightCorrections& w = t.corrections;
  float* const scale = t.scales == nullptr ? nullptr : t.scales + group;
  if (t.slow_save != nullptr) {
    copy_lane(t.slow_save, t.param, dtype_bytes(t.dtype), lane);
    if (w.slow_save != nullptr) copy_lane(w.slow_save, w.param, w.bytes, lane);
  }
  float param[kHeld], grad[kHeld], slow[kHeld], momentum[kHeld];
  load_weights(t.param, t.dtype, w.param, w.bytes, lane, param);
  if constexpr (kSlowFrom) load_weights(t.slow_from, t.dtype, w.slow_from, w.bytes, lane, slow);
  load_floats(t.grad, t.dtype, lane, grad);
  if constexpr (kMomentum) load_moments<true>(t.momentum, t.momentum_dtype, scale, lane, momentum);
  const uint32_t bits = lane.count == 0 ? 0u : mask_bits(t.mask, lane.at);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const bool selected = (bits >> k & 1) != 0;
    if constexpr (kMomentum) {
      const SgdElement e = sgd_momentum_one({param[k], momentum[k]}, grad[k], selected, s);
      momentum[k] = s.skip ? 0.0f : e.momentum;  // written then only if it is the first
      param[k] = s.skip ? param[k] : e.param;
    } else {
      param[k] = s.skip ? param[k] : sgd_one(param[k], grad[k], selected, s);
    }
    if constexpr (kSlowFrom) param[k] = lerp_one(slow[k], param[k], s.slow);
  }
  if constexpr (kMomentum) {
    if (!s.skip || s.first)
      store_moments<true>(t.momentum, t.momentum_dtype, false, scale, step, lane, momentum);
    if (s.skip && s.first && scale != nullptr && threadIdx.x % kWarp == 0) *scale = 0.0f;
  }
  if (!s.skip || kSlowFrom) store_weights(t.param, t.dtype, w.param, w.bytes, step, lane, param);
}

template <bool kMomentum, bool kSlowFrom>
__global__ void __launch_bounds__(kBlock, 2)
    sgd_compact_kernel(const __grid_constant__ List<SgdTensor> list, SgdOptions options,
                       StepInputs inputs, bool slow_save) {
  const SgdScalars s = sgd_scalars(options, step_numbers(inputs), step_state(inputs));
  if (blockIdx.x == 0 && threadIdx.x == 0) count_skip(inputs, s.skip);
  if (s.skip && !kSlowFrom && !slow_save && !(kMomentum && s.first)) return;
  each_unit(list, [&](const SgdTensor& t, int64_t, int64_t begin, int64_t end) {
    const WeightCorrections& w = t.corrections;
    const int64_t step = static_cast<int64_t>(*in_global(t.step)) + 1;
    each_compact(begin, end, t.row, t.scales != nullptr,
                 all_aligned(t.param, t.grad, t.momentum, t.slow_save, t.slow_from, w.param,
                             w.slow_save, w.slow_from),
                 [&](const Lane& lane, int64_t group) {
                   sgd_lane<kMomentum, kSlowFrom>(t, lane, group, step, s);
                 });
  });
  if (!s.skip) count_steps(list);
}

}  // namespace

void launch_sgd_step(const std::vector<SgdTensor>& tensors, const SgdOptions& options,
                     const StepInputs& inputs, const Queue& queue) {
  static TableCache tables("sgd_step_", sgd_step_kernel<false, false>, sgd_step_kernel<false, true>,
                           sgd_step_kernel<true, false>, sgd_step_kernel<true, true>);
  static TableCache compact("sgd_step_", sgd_compact_kernel<false, false>,
                            sgd_compact_kernel<false, true>, sgd_compact_kernel<true, false>,
                            sgd_compact_kernel<true, true>);
  if (tensors.empty()) return;
  const SgdTensor& one = first_filled(tensors);
  // all tensors have them, or none
  const bool momentum = one.momentum != nullptr;
  const bool slow_from = one.slow_from != nullptr;
  const bool counts = one.step != nullptr;  // so are weights in two pieces, and codes
  const auto run = [&](auto has_momentum, auto has_slow_from) {
    constexpr bool kMomentum = has_momentum, kSlowFrom = has_slow_from;
    if (counts) {
      compact.launch(sgd_compact_kernel<kMomentum, kSlowFrom>, tensors, queue, options, inputs,
                     one.slow_save != nullptr);
    } else {
      tables.launch(sgd_step_kernel<kMomentum, kSlowFrom>, tensors, queue, options, inputs,
                    one.slow_save != nullptr);
    }
  };
  with_flags(momentum, slow_from, run);
}

}  // namespace sfron
