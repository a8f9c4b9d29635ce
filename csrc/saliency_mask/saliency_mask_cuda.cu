#include "saliency_mask/saliency_mask.h"

#include "cuda/group.cuh"
#include "cuda/launch.cuh"
#include "cuda/sweep.cuh"
#include "cuda/table.cuh"

namespace sfron {
namespace {

constexpr int kResident = 4;  // blocks per processor, hence at most 64 registers
// A lane makes whole bytes of the mask, so no two lanes write the same one.
constexpr int kByte = 8;
constexpr int64_t kStride = kWarp * kByte;

// Whole bytes by 16-byte loads; returns how many bits are set.
__device__ __forceinline__ uint32_t saliency_groups(const SaliencyTensor& t, int64_t at,
                                                    int64_t stop, const SaliencyScalars& s) {
  constexpr int kUnroll = 2;  // eight 16-byte loads in flight
  Group<float, kByte> forget[kUnroll], retain[kUnroll];
  uint32_t selected = 0;
  each_group<kByte, kUnroll>(
      at, stop,
      [&](int u, int64_t e) {
        forget[u].load(t.forget, DType::kFloat32, e);
        retain[u].load(t.retain, DType::kFloat32, e);
      },
      [&](int u, int64_t e) {
        uint32_t byte = 0;
#pragma unroll
        for (int k = 0; k < kByte; ++k)
          byte |= saliency_one(forget[u].get(k), retain[u].get(k), s) ? 1u << k : 0u;
        in_global(t.mask)[e / kByte] = static_cast<uint8_t>(byte);
        selected += __popc(byte);
      });
  return selected;
}

// The same by single loads: the last byte, and pointers that are not at a multiple of 16 bytes.
__device__ __forceinline__ uint32_t saliency_singles(const SaliencyTensor& t, int64_t at,
                                                     int64_t stop, const SaliencyScalars& s) {
  const float* forget = in_global(t.forget);
  const float* retain = in_global(t.retain);
  uint32_t selected = 0;
#pragma unroll 1
  for (; at < stop; at += kStride) {
    uint32_t byte = 0;
#pragma unroll
    for (int k = 0; k < kByte; ++k) {
      if (at + k < stop) byte |= saliency_one(forget[at + k], retain[at + k], s) ? 1u << k : 0u;
    }
    in_global(t.mask)[at / kByte] = static_cast<uint8_t>(byte);
    selected += __popc(byte);
  }
  return selected;
}

// counts[i] += weights selected in tensor i, whole numbers added atomically: their sum does not
// depend on the order.
__global__ void __launch_bounds__(kBlock, kResident)
    saliency_mask_kernel(const __grid_constant__ List<SaliencyTensor> list, SaliencyScalars s,
                         int64_t* counts) {
  each_unit(list, [&](const SaliencyTensor t, int64_t i, int64_t begin, int64_t end) {
    const int lane = threadIdx.x % kWarp;
    const int64_t whole = all_aligned(t.forget, t.retain) ? end - (end - begin) % kByte : begin;
    uint32_t selected = saliency_groups(t, begin + lane * kByte, whole, s);
    selected += saliency_singles(t, whole + lane * kByte, end, s);
    const uint32_t total = __reduce_add_sync(~0u, selected);
    if (lane == 0 && total != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(counts + i),
                static_cast<unsigned long long>(total));
    }
  });
}

}  // namespace

void launch_saliency_mask(const std::vector<SaliencyTensor>& tensors, const SaliencyScalars& s,
                          int64_t* counts, const Queue& queue) {
  static TableCache tables("saliency_mask", saliency_mask_kernel);
  if (tensors.empty()) return;
  check_cuda(cudaSetDevice(queue.device), "saliency_mask", "selecting the device");
  const size_t bytes = tensors.size() * sizeof(int64_t);
  check_cuda(cudaMemsetAsync(counts, 0, bytes, static_cast<cudaStream_t>(queue.stream)),
             "saliency_mask", "clearing the counts");
  if (any_filled(tensors)) tables.launch(saliency_mask_kernel, tensors, queue, s, counts);
}

}  // namespace sfron
