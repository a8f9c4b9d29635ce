#pragma once
// The host side of a launch. Tables lie in device memory and not in kernel parameters: 4 KB hold some 40 tensors, and a
// list of thousands must still be one launch. A table is kept and found again by its bytes, so new storage of a tensor is
// noticed; then one asynchronous copy from pinned memory refreshes the oldest of a few slots that are allocated together
// at the first step (a cycle of SFR-on uses four lists). A captured graph must not see later refreshes: a table made
// under capture is uploaded beside the capture and never changes again.
#include <cuda_runtime.h>

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/flags.h"
#include "common/hd.h"
#include "common/table.cuh"

namespace sfron {

constexpr int kSlots = 8;
constexpr size_t kFamilies = 16;  // (length, device, stream) of one op; more are unusual, the oldest makes room
constexpr int64_t kMaxBlocks = 4096;
constexpr size_t kScratch = kMaxBlocks * sizeof(double) + 16;  // partials, then the counter of finished blocks

inline void check_cuda(cudaError_t error, const char* op, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("sfron_fast::") + op + ": " + what + " failed: " + cudaGetErrorString(error));
}

class Plans {
 public:
  explicit Plans(const char* op) : op_(op) {}

  // Device memory that holds `bytes` when the stream gets there, and zeroed scratch.
  void place(const std::vector<char>& bytes, const Queue& queue, char** table, char** scratch) {
    const cudaStream_t stream = static_cast<cudaStream_t>(queue.stream);
    const std::lock_guard<std::mutex> lock(mutex_);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &capture), "asking for a capture");
    if (capture != cudaStreamCaptureStatusNone) return place_for_ever(bytes, table, scratch);

    Family& family = family_of(bytes.size(), queue);
    *scratch = family.scratch;
    Slot* oldest = &family.slots[0];
    for (Slot& slot : family.slots) {
      if (slot.used != 0 && std::memcmp(slot.host, bytes.data(), bytes.size()) == 0) {
        slot.used = ++clock_;
        *table = slot.device;
        return;
      }
      if (slot.used < oldest->used) oldest = &slot;
    }
    if (oldest->used != 0) check(cudaEventSynchronize(oldest->copied), "an earlier copy");  // many steps ago: over
    std::memcpy(oldest->host, bytes.data(), bytes.size());
    check(cudaMemcpyAsync(oldest->device, oldest->host, bytes.size(), cudaMemcpyHostToDevice, stream), "a copy");
    check(cudaEventRecord(oldest->copied, stream), "recording an event");
    oldest->used = ++clock_;
    *table = oldest->device;
  }

 private:
  struct Slot {
    char *host = nullptr, *device = nullptr;  // [size] pinned; [size]
    cudaEvent_t copied = nullptr;
    uint64_t used = 0;
  };
  struct Family {
    size_t size = 0;
    Queue queue{};
    char *host = nullptr, *device = nullptr, *scratch = nullptr;
    Slot slots[kSlots];
    uint64_t used = 0;
  };

  void check(cudaError_t error, const char* what) const { check_cuda(error, op_, what); }

  Family& family_of(size_t size, const Queue& queue) {
    for (Family& f : families_) {
      if (f.size == size && f.queue.device == queue.device && f.queue.stream == queue.stream) {
        f.used = ++clock_;
        return f;
      }
    }
    if (families_.size() == kFamilies) {
      size_t oldest = 0;
      for (size_t i = 1; i < kFamilies; ++i) oldest = families_[i].used < families_[oldest].used ? i : oldest;
      release(families_[oldest]);
      families_.erase(families_.begin() + static_cast<std::ptrdiff_t>(oldest));
    }
    Family f;
    f.size = size;
    f.queue = queue;
    f.used = ++clock_;
    const size_t step = (size + 255) / 256 * 256;
    check(cudaMalloc(reinterpret_cast<void**>(&f.device), kSlots * step + kScratch), "allocating tables");
    check(cudaHostAlloc(reinterpret_cast<void**>(&f.host), kSlots * step, cudaHostAllocDefault), "pinning memory");
    f.scratch = f.device + kSlots * step;
    for (int i = 0; i < kSlots; ++i) {
      f.slots[i].host = f.host + i * step;
      f.slots[i].device = f.device + i * step;
      check(cudaEventCreateWithFlags(&f.slots[i].copied, cudaEventDisableTiming), "creating an event");
    }
    check(cudaMemsetAsync(f.scratch, 0, kScratch, static_cast<cudaStream_t>(queue.stream)), "clearing memory");
    families_.push_back(f);
    return families_.back();
  }

  void release(Family& f) {  // cudaFree waits for the work that uses the memory
    for (Slot& slot : f.slots) check(cudaEventDestroy(slot.copied), "destroying an event");
    check(cudaFree(f.device), "freeing tables");
    check(cudaFreeHost(f.host), "freeing memory");
  }

  // Small, and owned by whoever may still replay the graph: kept until the process ends.
  void place_for_ever(const std::vector<char>& bytes, char** table, char** scratch) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // these calls do not belong to the graph
    check(cudaThreadExchangeStreamCaptureMode(&mode), "leaving the capture");
    cudaStream_t side = nullptr;
    const size_t size = (bytes.size() + 255) / 256 * 256;
    cudaError_t error = cudaMalloc(reinterpret_cast<void**>(table), size + kScratch);
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking);
    if (error == cudaSuccess) {
      *scratch = *table + size;
      error = cudaMemcpyAsync(*table, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, side);
      if (error == cudaSuccess) error = cudaMemsetAsync(*scratch, 0, kScratch, side);
      const cudaError_t done = cudaStreamSynchronize(side);
      if (error == cudaSuccess) error = done;
      cudaStreamDestroy(side);
    }
    check(cudaThreadExchangeStreamCaptureMode(&mode), "returning to the capture");
    check(error, "placing a table under capture");
  }

  const char* op_;
  std::mutex mutex_;
  std::vector<Family> families_;
  uint64_t clock_ = 0;
};

// The list as a table on the device. Tensors are compared as bytes, so their struct must have no padding.
template <class Tensor>
Table<Tensor> make_table(Plans& plans, const std::vector<Tensor>& tensors, const Queue& queue) {
  const size_t count = tensors.size(), list = count * sizeof(Tensor);
  std::vector<char> bytes(list + (count + 1) * sizeof(int64_t));
  if (count > 0) std::memcpy(bytes.data(), tensors.data(), list);
  int64_t units = 0;
  for (size_t i = 0; i <= count; ++i) {
    std::memcpy(bytes.data() + list + i * sizeof(int64_t), &units, sizeof(int64_t));
    if (i < count) units += (tensors[i].numel + kDeviceUnit - 1) / kDeviceUnit;
  }
  char *table = nullptr, *scratch = nullptr;
  plans.place(bytes, queue, &table, &scratch);
  return {reinterpret_cast<const Tensor*>(table), reinterpret_cast<const int64_t*>(table + list),
          static_cast<int64_t>(count), units, reinterpret_cast<double*>(scratch),
          reinterpret_cast<uint32_t*>(scratch + kMaxBlocks * sizeof(double))};
}

// As many blocks as the device holds at once, or as the units need; never none, as the last block may have more to do
// than units.
template <class... Params>
int64_t blocks_for(const char* op, void (*kernel)(Params...), int64_t units, const Queue& queue) {
  int processors = 0, resident = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, queue.device), op, "asking a device");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kBlock, 0), op, "asking for occupancy");
  const int64_t wanted = (units + kWarps - 1) / kWarps, most = static_cast<int64_t>(processors) * resident;
  const int64_t blocks = wanted < most ? wanted : most;
  return blocks < 1 ? 1 : blocks > kMaxBlocks ? kMaxBlocks : blocks;
}

template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), int64_t blocks, const Queue& queue, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kBlock);
  config.stream = static_cast<cudaStream_t>(queue.stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), op, "launching the kernel");
}

// Torch's runtime and the one linked in here both keep a current device.
inline void use_device(const char* op, const Queue& queue) {
  check_cuda(cudaSetDevice(queue.device), op, "selecting the device");
}

}  // namespace sfron
