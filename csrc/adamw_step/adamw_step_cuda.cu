#include "adamw_step/adamw_step.h"

#include <type_traits>

#include "cuda/compact.cuh"
#include "cuda/group.cuh"
#include "cuda/launch.cuh"
#include "cuda/sweep.cuh"
#include "cuda/table.cuh"

namespace sfron {
namespace {

// Blocks per processor, hence at most 80 or 128 registers: up to six streams need them, Blackwell's
// code a few more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kPlain = 2;
#else
constexpr int kPlain = 3;
#endif
template <bool kAmsgrad, bool kSlowFrom>
constexpr int kResident = kAmsgrad || kSlowFrom ? 2 : kPlain;

// E: dtype of the parameters, S: of the moments. With kSlowFrom the result is interpolated from the
// slow weights.
template <bool kAmsgrad, bool kSlowFrom, class E, class S, int kCount>
__device__ __forceinline__ void adamw_groups(Held<E, S, kCount>, const AdamwTensor& t, int64_t at,
                                             int64_t stop, int64_t step, Corrections c,
                                             const AdamwScalars& s) {
  // four to twelve 16-byte loads in flight, or eight to twelve single ones
  constexpr int kUnroll = kCount == 8 ? 1 : 2;
  constexpr bool kAny = std::is_same_v<E, AnyElement>;
  const bool narrow = kAny ? is_narrow(t.state_dtype, t.dtype) : sizeof(S) < sizeof(E);
  Group<E, kCount> param[kUnroll], grad[kUnroll], slow[kUnroll];
  Group<S, kCount> avg[kUnroll], square[kUnroll], largest[kUnroll];
  uint32_t bits[kUnroll];
  each_group<kCount, kUnroll>(
      at, stop,
      [&](int u, int64_t e) {
        param[u].load(t.param, t.dtype, e);
        grad[u].load(t.grad, t.dtype, e);
        avg[u].load(t.exp_avg, t.state_dtype, e);
        square[u].load(t.exp_avg_sq, t.state_dtype, e);
        if constexpr (kAmsgrad) largest[u].load(t.max_exp_avg_sq, t.state_dtype, e);
        if constexpr (kSlowFrom) slow[u].load(t.slow_from, t.dtype, e);
        bits[u] = mask_bits(t.mask, e);
      },
      [&](int u, int64_t e) {
        if (t.slow_save != nullptr) param[u].store(t.slow_save, e);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          AdamwElement x{param[u].get(k), avg[u].get(k), square[u].get(k), 0.0f};
          if constexpr (kAmsgrad) x.max_exp_avg_sq = largest[u].get(k);
          if (!s.skip) {
            x = adamw_one<kAmsgrad>(x, grad[u].get(k), (bits[u] >> k & 1) != 0, c.scale, c.eps, s);
          }
          if constexpr (kSlowFrom) x.param = lerp_one(slow[u].get(k), x.param, s.slow);
          param[u].set(k, x.param);
          if (narrow) {
            const uint32_t threshold = dither_threshold(e + k, step);
            avg[u].set_bits(k, to_bfloat16_dithered(x.exp_avg, threshold));
            square[u].set_bits(k, to_bfloat16_dithered(x.exp_avg_sq, threshold));
          } else {
            avg[u].set(k, x.exp_avg);
            square[u].set(k, x.exp_avg_sq);
          }
          if constexpr (kAmsgrad) largest[u].set(k, x.max_exp_avg_sq);
        }
        avg[u].store(t.exp_avg, e);
        square[u].store(t.exp_avg_sq, e);
        if constexpr (kAmsgrad) largest[u].store(t.max_exp_avg_sq, e);
        param[u].store(t.param, e);
      });
}

// body(tensor, begin, end, its step, the corrections of that, scalars) for each unit of this warp;
// then counts the step. A body that takes the tensor by value keeps it in registers.
template <bool kSlowFrom, class Body>
__device__ __forceinline__ void adamw_units(const List<AdamwTensor>& list,
                                            const AdamwOptions& options, const StepInputs& inputs,
                                            bool slow_save, const Body& body) {
  const AdamwScalars s = adamw_scalars(options, step_numbers(inputs), step_state(inputs));
  if (blockIdx.x == 0 && threadIdx.x == 0) count_skip(inputs, s.skip);
  if (s.skip && !kSlowFrom && !slow_save) return;
  // the step that `c` belongs to: most lists have a single one, and it takes some time in double
  float known = 0.0f;
  Corrections c{};
  each_unit(list, [&](const AdamwTensor& t, int64_t, int64_t begin, int64_t end) {
    const float step = *in_global(t.step) + 1.0f;
    if (step != known) {
      known = step;
      c = adam_corrections(step_numbers(inputs).lr, options.beta1, options.beta2, options.eps,
                           static_cast<int64_t>(step));
    }
    body(t, begin, end, static_cast<int64_t>(step), c, s);
  });
  if (!s.skip) count_steps(list);  // a skipped step does not count
}

template <bool kAmsgrad, bool kSlowFrom>
__global__ void __launch_bounds__(kBlock, (kResident<kAmsgrad, kSlowFrom>))
    adamw_step_kernel(const __grid_constant__ List<AdamwTensor> list, AdamwOptions options,
                      StepInputs inputs, bool slow_save) {
  adamw_units<kSlowFrom>(list, options, inputs, slow_save,
                         [&](const AdamwTensor& t, int64_t begin, int64_t end, int64_t count,
                             Corrections c, const AdamwScalars& s) {
                           sweep(begin, end, t.dtype, t.state_dtype,
                                 all_aligned(t.param, t.grad, t.exp_avg, t.exp_avg_sq,
                                             t.max_exp_avg_sq, t.slow_save, t.slow_from),
                                 [&](auto held, int64_t at, int64_t stop) {
                                   adamw_groups<kAmsgrad, kSlowFrom>(held, t, at, stop, count, c,
                                                                     s);
                                 });
                         });
}

// Weights in two pieces, moments in codes.
template <bool kAmsgrad, bool kSlowFrom>
__device__ __forceinline__ void adamw_lane(const AdamwTensor& t, const Lane& lane, int64_t group,
                                           int64_t step, Corrections c, const AdamwScalars& s) {
  const WeightCorrections& w = t.corrections;
  const bool narrow_state = is_narrow(t.state_dtype, t.dtype, w.param != nullptr);
  float* const scale = t.scales == nullptr ? nullptr : t.scales + 2 * group;
  float* const square_scale = scale == nullptr ? nullptr : scale + 1;
  if (t.slow_save != nullptr) {
    copy_lane(t.slow_save, t.param, dtype_bytes(t.dtype), lane);
    if (w.slow_save != nullptr) copy_lane(w.slow_save, w.param, w.bytes, lane);
  }
  float param[kHeld], grad[kHeld], slow[kHeld], avg[kHeld], square[kHeld], largest[kHeld];
  load_weights(t.param, t.dtype, w.param, w.bytes, lane, param);
  if (!s.skip) {
    load_floats(t.grad, t.dtype, lane, grad);
    load_moments<true>(t.exp_avg, t.state_dtype, scale, lane, avg);
    load_moments<false>(t.exp_avg_sq, t.state_dtype, square_scale, lane, square);
    if constexpr (kAmsgrad) load_floats(t.max_exp_avg_sq, t.state_dtype, lane, largest);
    const uint32_t bits = lane.count == 0 ? 0u : mask_bits(t.mask, lane.at);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      AdamwElement x{param[k], avg[k], square[k], 0.0f};
      if constexpr (kAmsgrad) x.max_exp_avg_sq = largest[k];
      x = adamw_one<kAmsgrad>(x, grad[k], (bits >> k & 1) != 0, c.scale, c.eps, s);
      param[k] = x.param;
      avg[k] = x.exp_avg;
      square[k] = x.exp_avg_sq;
      if constexpr (kAmsgrad) largest[k] = x.max_exp_avg_sq;
    }
    store_moments<true>(t.exp_avg, t.state_dtype, narrow_state, scale, step, lane, avg);
    store_moments<false>(t.exp_avg_sq, t.state_dtype, narrow_state, square_scale, step, lane,
                         square);
    if constexpr (kAmsgrad) {
      store_floats(t.max_exp_avg_sq, t.state_dtype, false, step, lane, largest);
    }
  }
  if constexpr (kSlowFrom) {
    load_weights(t.slow_from, t.dtype, w.slow_from, w.bytes, lane, slow);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) param[k] = lerp_one(slow[k], param[k], s.slow);
  }
  if (!s.skip || kSlowFrom) store_weights(t.param, t.dtype, w.param, w.bytes, step, lane, param);
}

template <bool kAmsgrad, bool kSlowFrom>
__global__ void __launch_bounds__(kBlock, 2)
    adamw_compact_kernel(const __grid_constant__ List<AdamwTensor> list, AdamwOptions options,
                         StepInputs inputs, bool slow_save) {
  adamw_units<kSlowFrom>(
      list, options, inputs, slow_save,
      [&](const AdamwTensor& t, int64_t begin, int64_t end, int64_t count, Corrections c,
          const AdamwScalars& s) {
        const WeightCorrections& w = t.corrections;
        each_compact(begin, end, t.row, t.scales != nullptr,
                     all_aligned(t.param, t.grad, t.exp_avg, t.exp_avg_sq, t.max_exp_avg_sq,
                                 t.slow_save, t.slow_from, w.param, w.slow_save, w.slow_from),
                     [&](const Lane& lane, int64_t group) {
                       adamw_lane<kAmsgrad, kSlowFrom>(t, lane, group, count, c, s);
                     });
      });
}

}  // namespace

void launch_adamw_step(const std::vector<AdamwTensor>& tensors, const AdamwOptions& options,
                       const StepInputs& inputs, const Queue& queue) {
  static TableCache tables("adamw_step_", adamw_step_kernel<false, false>,
                           adamw_step_kernel<false, true>, adamw_step_kernel<true, false>,
                           adamw_step_kernel<true, true>);
  static TableCache compact("adamw_step_", adamw_compact_kernel<false, false>,
                            adamw_compact_kernel<false, true>, adamw_compact_kernel<true, false>,
                            adamw_compact_kernel<true, true>);
  if (tensors.empty()) return;
  const AdamwTensor& one = first_filled(tensors);
  // all tensors have them, or none
  const bool amsgrad = one.max_exp_avg_sq != nullptr;
  const bool slow_from = one.slow_from != nullptr;
  const auto run = [&](auto has_amsgrad, auto has_slow_from) {
    constexpr bool kAmsgrad = has_amsgrad, kSlowFrom = has_slow_from;
    if (any_compact(tensors)) {
      compact.launch(adamw_compact_kernel<kAmsgrad, kSlowFrom>, tensors, queue, options, inputs,
                     one.slow_save != nullptr);
    } else {
      tables.launch(adamw_step_kernel<kAmsgrad, kSlowFrom>, tensors, queue, options, inputs,
                    one.slow_save != nullptr);
    }
  };
  with_flags(amsgrad, slow_from, run);
}

}  // namespace sfron
