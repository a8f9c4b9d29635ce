#include "masked_grad_norm/masked_grad_norm.h"

#include <cmath>

#include "cuda/group.cuh"
#include "cuda/launch.cuh"
#include "cuda/sweep.cuh"
#include "cuda/table.cuh"

namespace sfron {
namespace {

constexpr int kUnroll = 4;    // one stream: it takes four 16-byte loads to hide the latency
constexpr int kResident = 4;  // blocks per processor, hence at most 64 registers

// Adds to this lane's sum, in double.
template <class E, class S, int kCount>
__device__ __forceinline__ void square_groups(Held<E, S, kCount>, const MaskedGradNormTensor& t,
                                              int64_t at, int64_t stop, float inverse_scale,
                                              double& sum) {
  Group<E, kCount> grad[kUnroll];
  uint32_t bits[kUnroll];
  each_group<kCount, kUnroll>(
      at, stop,
      [&](int u, int64_t e) {
        grad[u].load(t.grad, t.dtype, e);
        bits[u] = mask_bits(t.mask, e);
      },
      [&](int u, int64_t) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          sum += masked_square_one(grad[u].get(k), (bits[u] >> k & 1) != 0, inverse_scale);
        }
      });
}

// The sum over the block, in thread 0; a tree, so always in the same order.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double sums[kBlock];
  sums[threadIdx.x] = value;
  __syncthreads();  // every value is there before another thread adds it
  for (unsigned half = kBlock / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();  // a level is done before the next reads it
  }
  return sums[0];
}

// norm [], from the sums of the blocks, which the last one adds. The order of addition depends on
// the list and the device alone, not on which block comes last.
__global__ void __launch_bounds__(kBlock, kResident)
    masked_grad_norm_kernel(const __grid_constant__ List<MaskedGradNormTensor> list,
                            const float* grad_scale, float* norm) {
  const float inverse_scale = grad_scale == nullptr ? 1.0f : 1.0f / *grad_scale;
  double sum = 0.0;
  each_unit(list, [&](const MaskedGradNormTensor t, int64_t, int64_t begin, int64_t end) {
    sweep(begin, end, t.dtype, t.dtype, aligned(t.grad), [&](auto held, int64_t at, int64_t stop) {
      square_groups(held, t, at, stop, inverse_scale, sum);
    });
  });
  // one partial for each block, then all of them in the last block
  const double total = block_sum(sum);
  double* const partials = list.table.partials;
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
  in_last_block(list.table.finished, [&] {
    double rest = 0.0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += kBlock) rest += partials[i];
    const double all = block_sum(rest);
    if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(all));
  });
}

}  // namespace

void launch_masked_grad_norm(const std::vector<MaskedGradNormTensor>& tensors,
                             const float* grad_scale, float* norm, const Queue& queue) {
  static TableCache tables("masked_grad_norm", masked_grad_norm_kernel);
  tables.launch(masked_grad_norm_kernel, tensors, queue, grad_scale, norm);
}

}  // namespace sfron
