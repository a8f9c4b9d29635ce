#pragma once
// How a list of tensors is divided on the device. Each tensor is cut into units; each warp takes
// every n-th unit of the whole list, so 10,000 small tensors and one large keep all processors busy
// alike, in one launch. Neighbouring units go to different blocks: processors differ by one unit at
// most, whatever the list.
#include <cuda_runtime.h>

#include <cstdint>

#include "formulas/scalar.h"

namespace sfron {

constexpr int kBlock = 256;  // threads
constexpr int kWarp = 32;
constexpr int kWarps = kBlock / kWarp;
constexpr int64_t kMaxBlocks = 4096;
// log2 of the elements in a unit: multiples of every group of a warp and of a mask byte. Large
// ones, 8 KB of a stream, cost fewest searches; where they would leave processors idle they are
// smaller.
constexpr int32_t kMostUnit = 11, kLeastUnit = 9;

// Units of a tensor.
inline int64_t units_of(int64_t numel, int32_t unit) {
  return (numel + (int64_t{1} << unit) - 1) >> unit;
}

// What a kernel knows of a list; `data` as table_bytes (launch.cuh) lays it out.
template <class Tensor>
struct Table {
  const char* data;    // or null: in the parameters
  double* partials;    // [kMaxBlocks] scratch of a reduction
  uint32_t* finished;  // [] blocks that are done; 0 between launches
  int64_t count, units;
  int32_t unit;    // log2 of the elements in a unit
  int32_t stride;  // log2 of the units from one entry of the coarse index to the next

  SFRON_HD const Tensor* tensors() const {
    return reinterpret_cast<const Tensor*>(data);
  }  // [count]
  // [count + 1] units before each tensor; an empty tensor has none
  SFRON_HD const int64_t* first() const {
    return reinterpret_cast<const int64_t*>(tensors() + count);
  }
  // [(units >> stride) + 2] the tensor that holds every 2^stride-th unit; the last one from the end
  // on
  SFRON_HD const int32_t* coarse() const {
    return reinterpret_cast<const int32_t*>(first() + count + 1);
  }
};

// The parameter of a kernel, declared `const __grid_constant__`, so that its bytes can be read
// where they lie.
template <class Tensor>
struct List {
  Table<Tensor> table;
  alignas(16) char bytes[3584];  // of a short list: some 30 tensors

  SFRON_HD Table<Tensor> opened() const {
    Table<Tensor> open = table;
    if (open.data == nullptr) open.data = bytes;
#if defined(__CUDA_ARCH__)
    // chosen anew wherever this is asked for: a kernel has no registers to keep it in
    asm volatile("" : "+l"(open.data));
#endif
    return open;
  }
};

// The tensor that holds a unit: the last one that starts at or before it, so empty ones are stepped
// over. The index leaves few to choose from; among 10,000 a search alone would wait fourteen times
// for memory.
template <class Tensor>
SFRON_HD int64_t find_tensor(const Table<Tensor>& table, int64_t unit) {
  const int64_t* first = table.first();
  const int32_t* coarse = table.coarse() + (unit >> table.stride);
  int64_t low = coarse[0], high = coarse[1] + 1;  // first[low] <= unit < first[high]
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
  const int64_t i = find_tensor(table, unit);
  const int64_t begin = (unit - table.first()[i]) << table.unit, numel = table.tensors()[i].numel;
  const int64_t end = begin + (int64_t{1} << table.unit);
  return {i, begin, end < numel ? end : numel};
}

// body(tensor, its index, begin, end) for each unit of this warp.
template <class Tensor, class Body>
__device__ __forceinline__ void each_unit(const List<Tensor>& list, const Body& body) {
  const int64_t workers = static_cast<int64_t>(gridDim.x) * kWarps;
  int64_t unit = static_cast<int64_t>(threadIdx.x / kWarp) * gridDim.x + blockIdx.x;
  for (; unit < list.table.units; unit += workers) {
    const Table<Tensor> table = list.opened();
    const Stretch s = stretch_of(table, unit);
    body(table.tensors()[s.tensor], s.tensor, s.begin, s.end);
  }
}

// f() in the block that finishes last: every other block has read all it wants to, and what they
// wrote is seen.
template <class F>
__device__ __forceinline__ void in_last_block(uint32_t* finished, const F& f) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;  // which sets it to 0 again
    __threadfence();
  }
  __syncthreads();
  if (last) f();
}

// One more update of every tensor: only after every block has read the counts.
template <class Tensor>
__device__ __forceinline__ void count_steps(const List<Tensor>& list) {
  in_last_block(list.table.finished, [&] {
    const Table<Tensor> table = list.opened();
    for (int64_t i = threadIdx.x; i < table.count; i += kBlock)
      *in_global(table.tensors()[i].step) += 1.0f;
  });
}

}  // namespace sfron
