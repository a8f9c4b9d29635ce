#pragma once
// TEST ONLY: just enough of the CUDA runtime to run the .cu files of csrc/ on the host, under
// sanitizers: blocks and their threads (fibers.h), streams and captures (streams.h). Races inside a
// block and the hardware's memory order do not show.
#include <algorithm>
#include <memory>
#include <set>
#include <tuple>

#include "fibers.h"
#include "streams.h"

#define __global__
#define __device__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static thread_local  // a thread of the host runs one block at a time
#define __builtin_assume(condition) ((void)0)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}
inline bool __isGlobal(const void*) {
  return true;
}
inline int __popc(uint32_t x) {
  return __builtin_popcount(x);
}

inline void __syncthreads() {
  shim::barrier();
}

// ThreadSanitizer knows nothing of fences. What is before a fence and an atomic operation is seen
// by who takes an atomic operation on the same place and a fence after it; an atomic operation
// alone orders nothing.
namespace shim {
inline void before_atomic(void* at) {
#if defined(__SANITIZE_THREAD__)
  Fiber& f = fibers[current];
  if (f.fenced) __tsan_release(at);
  f.fenced = false;
  f.atomic = at;
#endif
}
}  // namespace shim

inline void __threadfence() {
#if defined(__SANITIZE_THREAD__)
  shim::Fiber& f = shim::fibers[shim::current];
  if (f.atomic != nullptr) __tsan_acquire(f.atomic);
  f.atomic = nullptr;
  f.fenced = true;
#endif
}

inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  static thread_local unsigned values[shim::kThreads];
  const unsigned first = threadIdx.x / 32 * 32;
  values[threadIdx.x] = value;
  // of the warp: each round of the scheduler takes all its threads to the same one
  shim::barrier();
  const unsigned total = std::accumulate(values + first, values + first + 32, 0u);
  shim::barrier();
  return total;
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  static thread_local unsigned values[shim::kThreads];
  const unsigned first = threadIdx.x / 32 * 32;
  values[threadIdx.x] = value;
  shim::barrier();
  const unsigned most = *std::max_element(values + first, values + first + 32);
  shim::barrier();
  return most;
}

template <class T>
T atomicAdd(T* at, T value) {
  shim::before_atomic(at);
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

inline unsigned atomicInc(unsigned* at, unsigned most) {
  shim::before_atomic(at);
  unsigned old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(at, &old, old >= most ? 0 : old + 1, true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return old;
}

enum {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};

struct cudaFuncAttributes {};

namespace shim {
inline int64_t launches = 0;
inline std::set<const void*> loaded;  // kernels
inline cudaError_t load_error = cudaSuccess;
}  // namespace shim

inline const char* cudaGetErrorString(cudaError_t) {
  return "an error of the shim";
}
inline const char* cudaGetErrorName(cudaError_t) {
  return "cudaErrorOfTheShim";
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  return *value = 2, cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
  shim::unsafe();  // loads it
  if (shim::load_error == cudaSuccess) shim::loaded.insert(kernel);
  return shim::load_error;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* value, const void*, int,
                                                                 size_t) {
  return *value = 2, cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Args&... args) {
  if (shim::loaded.count(reinterpret_cast<const void*>(kernel)) == 0) shim::unsafe();
  ++shim::launches;
  const auto call = [kernel, params = std::make_shared<std::tuple<Params...>>(
                                 static_cast<Params>(args)...)] { std::apply(kernel, *params); };
  shim::enqueue(config->stream, [call, grid = config->gridDim, block = config->blockDim] {
    shim::run_grid(
        grid, block, [](void* f) { (*static_cast<const decltype(call)*>(f))(); },
        const_cast<void*>(static_cast<const void*>(&call)));
  });
  return cudaSuccess;
}
