#pragma once
// TEST ONLY: a block of a kernel on one thread of the host. Its threads are fibers that run one
// after the other, in a shuffled order, and change places at barriers; a result that depends on the
// order shows. Under ThreadSanitizer every block has a thread of its own, so that what blocks do to
// each other without an order is reported.
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#else
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1) : x(x_) {}
};
inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace shim {

constexpr size_t kStack = 256 << 10;
constexpr unsigned kThreads = 256;

// How a sanitizer is told that a thread of the host goes on with another stack.
#if defined(__SANITIZE_THREAD__)
struct Switch {
  void* fiber = nullptr;
  void make() { fiber = __tsan_create_fiber(0); }
  void here() { fiber = __tsan_get_current_fiber(); }
  void before(const void*, size_t, bool, Switch& to) { __tsan_switch_to_fiber(to.fiber, 0); }
  void after() {}
  void end() { __tsan_destroy_fiber(fiber); }
};
#else
struct Switch {
  void* fake = nullptr;
  void make() { fake = nullptr; }
  void here() {}
  void before(const void* stack, size_t size, bool last, Switch&) {
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, stack, size);
  }
  void after() { __sanitizer_finish_switch_fiber(fake, nullptr, nullptr); }
  void end() {}
};
#endif

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Switch at;
  uint64_t barriers = 0;  // passed or waited at
  bool done = false;
  bool fenced = false;     // since the last atomic operation
  void* atomic = nullptr;  // place of the last one since the last fence
};

inline thread_local std::unique_ptr<Fiber[]> fibers;
inline thread_local ucontext_t scheduler;
inline thread_local Switch scheduler_at;
inline thread_local const void* scheduler_stack = nullptr;
inline thread_local size_t scheduler_size = 0;
inline thread_local unsigned current = 0;
inline thread_local void (*body)(void*) = nullptr;
inline thread_local void* argument = nullptr;

inline void to_scheduler(bool last) {
  Fiber& f = fibers[current];
  f.at.before(scheduler_stack, scheduler_size, last, scheduler_at);
  swapcontext(&f.context, &scheduler);
  f.at.after();
}

inline void fiber_main() {
#if !defined(__SANITIZE_THREAD__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  body(argument);
  fibers[current].done = true;
  to_scheduler(true);
}

// All threads of the block, resp. of the warp, must call it equally often before any goes on.
inline void barrier() {
  ++fibers[current].barriers;
  to_scheduler(false);
}

inline void run_block(unsigned threads, unsigned seed) {
  if (fibers == nullptr) fibers.reset(new Fiber[kThreads]);
  scheduler_at.here();
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = fibers[t];
    if (f.stack == nullptr) f.stack.reset(new char[kStack]);
    f.done = f.fenced = false;
    f.barriers = 0;
    f.atomic = nullptr;
    f.at.make();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
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
      scheduler_at.before(fibers[t].stack.get(), kStack, false, fibers[t].at);
      swapcontext(&scheduler, &fibers[t].context);
      scheduler_at.after();
      alive = alive || !fibers[t].done;
    }
    for (unsigned t = 0; t < threads;
         ++t) {  // a warp may be ahead of another, a thread of its warp may not
      const Fiber &f = fibers[t], &first = fibers[t / 32 * 32];
      if (f.done != first.done || f.barriers != first.barriers) std::abort();
    }
  }
  for (unsigned t = 0; t < threads; ++t) fibers[t].at.end();
}

// All blocks, in a shuffled order or at the same time.
inline void run_grid(dim3 grid, dim3 block, void (*run)(void*), void* with) {
  static std::mt19937 random{1};
  std::vector<unsigned> order(grid.x);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  const auto one = [=](unsigned index, unsigned seed) {
    gridDim = grid;
    blockDim = block;
    blockIdx = dim3(index);
    body = run;
    argument = with;
    run_block(block.x, seed);
  };
#if defined(__SANITIZE_THREAD__)
  std::vector<std::thread> threads;
  for (const unsigned index : order) threads.emplace_back(one, index, random());
  for (std::thread& thread : threads) thread.join();
#else
  for (const unsigned index : order) one(index, random());
#endif
}

}  // namespace shim
