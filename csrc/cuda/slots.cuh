#pragma once
// Where the tables of long lists lie on the device. A table is kept and found again by its bytes,
// so new storage of a tensor is noticed; then one asynchronous copy from pinned memory refreshes
// the oldest slot of its ring. A ring serves one stream, which orders the copy behind the kernels
// that read the slot before; only the pinned source must wait for the copy before it. Where that is
// not over, because the host runs ahead, the ring grows rather than wait.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "formulas/scalar.h"

namespace sfron {

// Allocated together at the first step: a cycle of SFR-on uses four lists.
constexpr size_t kFirstSlots = 8;
// Then the host waits.
constexpr size_t kMostSlots = 64;

inline void check_cuda(cudaError_t error, const char* op, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("sfron_fast::") + op + ": expected " + what +
                           " to succeed, found " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) +
                           "); if an earlier kernel failed, CUDA_LAUNCH_BLOCKING=1 tells which");
}

// While it lives, calls of this thread are no part of a capture, nor forbidden by one.
class BesideCapture {
 public:
  BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCapture(const BesideCapture&) = delete;
  ~BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

class Ring {
 public:
  // For tables of up to `size` bytes.
  Ring(const char* op, size_t size, const Queue& queue) : op_(op), size_(size), queue_(queue) {}

  bool serves(size_t size, const Queue& queue) const {
    return size == size_ && queue.device == queue_.device && queue.stream == queue_.stream;
  }

  // Device memory that holds `bytes` when the stream gets there.
  const char* place(const std::vector<char>& bytes) {
    Slot* oldest = nullptr;
    for (Slot& slot : slots_) {
      if (slot.length == bytes.size() && std::memcmp(slot.host, bytes.data(), bytes.size()) == 0) {
        slot.used = ++clock_;
        return slot.device;
      }
      if (oldest == nullptr || slot.used < oldest->used) oldest = &slot;
    }
    if (oldest == nullptr || (slots_.size() < kMostSlots && is_busy(*oldest))) oldest = grow();
    return refresh(*oldest, bytes);
  }

 private:
  struct Slot {
    char *host, *device;  // [size_] pinned; [size_]
    cudaEvent_t copied;
    size_t length = 0;  // bytes that are valid in both
    uint64_t used = 0;
  };

  void check(cudaError_t error, const char* what) const { check_cuda(error, op_, what); }

  bool is_busy(const Slot& slot) const {
    const cudaError_t state = cudaEventQuery(slot.copied);
    if (state != cudaErrorNotReady) check(state, "asking for an earlier copy");
    return state == cudaErrorNotReady;
  }

  const char* refresh(Slot& slot, const std::vector<char>& bytes) {
    const cudaStream_t stream = static_cast<cudaStream_t>(queue_.stream);
    // over at once, unless the ring is as long as it gets
    check(cudaEventSynchronize(slot.copied), "an earlier copy");
    slot.length = 0;
    std::memcpy(slot.host, bytes.data(), bytes.size());
    check(cudaMemcpyAsync(slot.device, slot.host, bytes.size(), cudaMemcpyHostToDevice, stream),
          "a copy");
    check(cudaEventRecord(slot.copied, stream), "recording an event");
    slot.length = bytes.size();
    slot.used = ++clock_;
    return slot.device;
  }

  // As many slots again; returns the first of the new ones. They are kept until the process ends.
  Slot* grow() {
    const size_t before = slots_.size(), more = before == 0 ? kFirstSlots : before;
    char *device = nullptr, *host = nullptr;
    check(cudaMalloc(reinterpret_cast<void**>(&device), more * size_), "allocating tables");
    check(cudaHostAlloc(reinterpret_cast<void**>(&host), more * size_, cudaHostAllocDefault),
          "pinning memory");
    for (size_t i = 0; i < more; ++i) {
      cudaEvent_t copied = nullptr;
      check(cudaEventCreateWithFlags(&copied, cudaEventDisableTiming), "creating an event");
      slots_.push_back({host + i * size_, device + i * size_, copied});
    }
    return &slots_[before];
  }

  const char* op_;
  size_t size_;
  Queue queue_;
  std::vector<Slot> slots_;
  uint64_t clock_ = 0;
};

}  // namespace sfron
