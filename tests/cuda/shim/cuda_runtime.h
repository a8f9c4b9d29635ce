#pragma once
// TEST ONLY: just enough of the CUDA runtime to run the .cu files of csrc/ on the host, under sanitizers. Each block runs
// alone; its threads are fibers that run one after the other and change places at barriers. Blocks and threads run in a
// shuffled order, so a result that depends on the order shows. Races inside a block and the hardware's memory order do not.
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time
#define __builtin_assume(condition) ((void)0)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1) : x(x_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline bool __isGlobal(const void*) { return true; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace shim {

constexpr size_t kStack = 256 << 10;
constexpr unsigned kThreads = 256;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  void* fake = nullptr;
  uint64_t barriers = 0;  // passed or waited at
  bool done = false;
};

inline Fiber fibers[kThreads];
inline ucontext_t scheduler;
inline void* scheduler_fake = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_size = 0;
inline unsigned current = 0;
inline void (*body)(void*) = nullptr;
inline void* argument = nullptr;
inline std::mt19937 random{1};
inline int64_t launches = 0, allocations = 0, copies = 0;
inline bool capturing = false;

inline void to_scheduler(bool last) {
  Fiber& f = fibers[current];
  __sanitizer_start_switch_fiber(last ? nullptr : &f.fake, scheduler_stack, scheduler_size);
  swapcontext(&f.context, &scheduler);
  __sanitizer_finish_switch_fiber(f.fake, &scheduler_stack, &scheduler_size);
}

inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
  body(argument);
  fibers[current].done = true;
  to_scheduler(true);
}

// All threads of the block, resp. of the warp, must call it equally often before any goes on.
inline void barrier() {
  ++fibers[current].barriers;
  to_scheduler(false);
}

inline void run_block(unsigned threads) {
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = fibers[t];
    f.stack.resize(kStack);
    f.done = false;
    f.barriers = 0;
    f.fake = nullptr;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
  }
  for (bool alive = true; alive;) {  // a round takes every thread to its next barrier
    alive = false;
    for (const unsigned t : order) {
      if (fibers[t].done) continue;
      current = t;
      threadIdx = dim3(t);
      __sanitizer_start_switch_fiber(&scheduler_fake, fibers[t].stack.data(), kStack);
      swapcontext(&scheduler, &fibers[t].context);
      __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
      alive = alive || !fibers[t].done;
    }
    for (unsigned t = 0; t < threads; ++t) {  // a warp may be ahead of another, a thread of its warp may not
      const Fiber &f = fibers[t], &first = fibers[t / 32 * 32];
      if (f.done != first.done || f.barriers != first.barriers) std::abort();
    }
  }
}

}  // namespace shim

inline void __syncthreads() { shim::barrier(); }
inline void __threadfence() {}

inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  static unsigned values[shim::kThreads];
  const unsigned first = threadIdx.x / 32 * 32;
  values[threadIdx.x] = value;
  shim::barrier();  // of the warp: each round of the scheduler takes all its threads to the same one
  const unsigned total = std::accumulate(values + first, values + first + 32, 0u);
  shim::barrier();
  return total;
}

template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}

using cudaError_t = int;
using cudaStream_t = void*;
using cudaEvent_t = void*;
enum { cudaSuccess = 0, cudaHostAllocDefault = 0, cudaEventDisableTiming = 0, cudaStreamNonBlocking = 1 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
enum { cudaMemcpyHostToDevice, cudaDevAttrMultiProcessorCount };

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the shim"; }
inline cudaError_t cudaMalloc(void** at, size_t size) {
  ++shim::allocations;
  *at = std::aligned_alloc(256, (size + 255) / 256 * 256);
  std::memset(*at, 0x7f, size);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** at, size_t size, unsigned) { return cudaMalloc(at, size); }
inline cudaError_t cudaFree(void* at) { return std::free(at), cudaSuccess; }
inline cudaError_t cudaFreeHost(void* at) { return std::free(at), cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, int, cudaStream_t) {
  ++shim::copies;
  return std::memcpy(to, from, size), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t size, cudaStream_t) {
  return std::memset(at, value, size), cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = shim::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 2, cudaSuccess; }

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* value, Kernel, int, size_t) {
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
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
  ++shim::launches;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  auto call = [&] { kernel(static_cast<Params>(args)...); };
  shim::body = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
  shim::argument = &call;
  std::vector<unsigned> order(gridDim.x);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), shim::random);
  for (const unsigned block : order) {
    blockIdx = dim3(block);
    shim::run_block(blockDim.x);
  }
  return cudaSuccess;
}
