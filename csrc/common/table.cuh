#pragma once
// How a list of tensors is divided on the device. Each tensor is cut into units; each warp takes every n-th unit of the
// whole list, so 10,000 small tensors and one large keep all processors busy alike, in one launch. Neighbouring units
// go to different blocks: processors differ by one unit at most, whatever the list.
#include <cuda_runtime.h>

#include <cstdint>

namespace sfron {

constexpr int kBlock = 256;  // threads
constexpr int kWarp = 32;
constexpr int kWarps = kBlock / kWarp;
constexpr int64_t kDeviceUnit = 2048;  // elements: 8 KB of a stream; a multiple of every group, unroll and mask byte

template <class Tensor>
struct Table {
  const Tensor* tensors;  // [count]
  const int64_t* first;   // [count + 1] units before each tensor; an empty tensor has none
  int64_t count, units;
  double* partials;    // [kMaxBlocks] scratch of a reduction
  uint32_t* finished;  // [] blocks that are done; 0 between launches
};

// The tensor that holds a unit: the last one that starts at or before it, so empty ones are stepped over.
SFRON_HD int64_t find_tensor(const int64_t* first, int64_t count, int64_t unit) {
  int64_t low = 0, high = count;  // first[low] <= unit < first[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (first[middle] <= unit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

struct Stretch {
  int64_t tensor, begin, end;  // elements [begin, end)
};

template <class Tensor>
SFRON_HD Stretch stretch_of(const Table<Tensor>& table, int64_t unit) {
  const int64_t i = find_tensor(table.first, table.count, unit);
  const int64_t begin = (unit - table.first[i]) * kDeviceUnit, numel = table.tensors[i].numel;
  return {i, begin, begin + kDeviceUnit < numel ? begin + kDeviceUnit : numel};
}

// body(tensor index, begin, end) for each unit of this warp.
template <class Tensor, class Body>
__device__ __forceinline__ void each_unit(const Table<Tensor>& table, const Body& body) {
  const int64_t workers = static_cast<int64_t>(gridDim.x) * kWarps;
  int64_t unit = static_cast<int64_t>(threadIdx.x / kWarp) * gridDim.x + blockIdx.x;
  for (; unit < table.units; unit += workers) {
    const Stretch s = stretch_of(table, unit);
    body(s.tensor, s.begin, s.end);
  }
}

// Where to load from for the group at `at` + `ahead`: beyond the end the first group again, and unused. A load without a
// condition needs no register before it, and those of a loop are in flight together.
__device__ __forceinline__ int64_t clamped(int64_t at, int64_t ahead, int64_t stop) {
  return at + ahead < stop ? at + ahead : at;
}

// Elements [begin, end) by one warp: run_groups(first, stop) of this lane over whole groups, if the pointers allow
// it, and run_singles(first, stop) over the rest. Units begin at multiples of every group, so no head is needed: a
// pointer is at a multiple of 16 bytes for the whole tensor or, by singles that still coalesce, for none of it.
template <class Groups, class Singles>
__device__ __forceinline__ void sweep(
    int64_t begin, int64_t end, int group, bool vector, const Groups& run_groups, const Singles& run_singles) {
  const int lane = threadIdx.x % kWarp;
  int64_t rest = begin;
  if (vector) {
    rest = end - (end - begin) % group;
    run_groups(begin + lane * group, rest);
  }
  if (rest < end) run_singles(rest + lane, end);
}

// f() in the block that finishes last, when every other block has read all it wants to.
template <class F>
__device__ __forceinline__ void in_last_block(uint32_t* finished, const F& f) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  f();
  if (threadIdx.x == 0) *finished = 0;
}

}  // namespace sfron
