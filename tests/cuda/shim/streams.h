#pragma once
// TEST ONLY: streams, events and captures of the CUDA runtime. What a stream is given is queued. It
// is done at once or, with `deferred`, as late as the program allows: when it waits for the stream.
// A copy from pinned memory reads it then.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <vector>

using cudaError_t = int;
using cudaStream_t = void*;
enum {
  cudaSuccess = 0,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorNotReady = 600,
  cudaHostAllocDefault = 0,
  cudaEventDisableTiming = 2,
  cudaStreamNonBlocking = 1,
  cudaMemcpyHostToDevice = 1
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };

namespace shim {

using Work = std::function<void()>;

struct Stream {
  std::deque<Work> pending;
  uint64_t queued = 0, done = 0;
};

struct Event {
  cudaStream_t stream = nullptr;
  uint64_t at = 0;  // done when that much of the stream is
};

inline std::map<cudaStream_t, Stream> streams;
inline std::map<const char*, size_t> pinned;
inline int64_t allocations = 0, copies = 0, waits = 0;
inline bool deferred = false;
inline bool capturing = false;  // the null stream
inline cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
inline std::vector<Work> graph;

inline void advance(cudaStream_t stream, uint64_t to) {
  Stream& s = streams[stream];
  while (s.done < to) {
    const Work work = s.pending.front();
    s.pending.pop_front();
    ++s.done;
    work();
  }
}

inline void finish() {
  for (auto& [stream, state] : streams) advance(stream, state.queued);
}

inline void enqueue(cudaStream_t stream, Work work) {
  if (capturing && stream == nullptr) return graph.push_back(std::move(work));
  Stream& s = streams[stream];
  s.pending.push_back(std::move(work));
  ++s.queued;
  if (!deferred) advance(stream, s.queued);
}

inline void replay() {
  for (const Work& work : graph) enqueue(nullptr, work);
}

// Calls that would break a capture, unless the thread has stepped beside it.
inline void unsafe() {
  if (!capturing || mode == cudaStreamCaptureModeRelaxed) return;
  std::puts("a call that breaks a capture");
  std::fflush(stdout);
  std::_Exit(1);
}

inline bool is_pinned(const void* at) {
  const auto after = pinned.upper_bound(static_cast<const char*>(at));
  if (after == pinned.begin()) return false;
  const auto& [begin, size] = *std::prev(after);
  return static_cast<const char*>(at) < begin + size;
}

}  // namespace shim

using cudaEvent_t = shim::Event*;

inline cudaError_t cudaMalloc(void** at, size_t size) {
  shim::unsafe();
  ++shim::allocations;
  *at = std::aligned_alloc(256, (size + 255) / 256 * 256);
  std::memset(*at, 0x7f, size);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** at, size_t size, unsigned) {
  cudaMalloc(at, size);
  shim::pinned[static_cast<const char*>(*at)] = size;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, int,
                                   cudaStream_t stream) {
  ++shim::copies;
  if (shim::is_pinned(from)) {
    shim::enqueue(stream, [=] { std::memcpy(to, from, size); });
  } else {  // the runtime takes a copy before it returns
    const char* bytes = static_cast<const char*>(from);
    shim::enqueue(stream, [to, taken = std::vector<char>(bytes, bytes + size)] {
      std::memcpy(to, taken.data(), taken.size());
    });
  }
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t size, cudaStream_t stream) {
  shim::enqueue(stream, [=] { std::memset(at, value, size); });
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = new shim::Event, cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  *event = {stream, shim::streams[stream].queued};
  return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  shim::unsafe();
  return shim::streams[event->stream].done >= event->at ? cudaSuccess : cudaErrorNotReady;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  shim::waits += cudaEventQuery(event) != cudaSuccess;
  shim::advance(event->stream, event->at);
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  static uintptr_t made = 100;
  return *stream = reinterpret_cast<cudaStream_t>(++made), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  shim::unsafe();
  shim::advance(stream, shim::streams[stream].queued);
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, shim::mode);
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = shim::capturing && stream == nullptr ? cudaStreamCaptureStatusActive
                                                 : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
