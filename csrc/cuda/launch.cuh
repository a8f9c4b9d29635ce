#pragma once
// The host side of a launch. A short list travels in the kernel's parameters, which cost nothing:
// no copy, no slot, and in a captured graph no memory. A long one lies in device memory
// (slots.cuh), as 4 KB hold some 30 tensors and thousands must still be one launch; a captured
// graph must not see later refreshes, so its table is uploaded beside the capture and never changes
// again.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda/slots.cuh"
#include "cuda/table.cuh"
#include "formulas/flags.h"
#include "formulas/scalar.h"

namespace sfron {

// Partials, then the counter of finished blocks.
constexpr size_t kScratch = kMaxBlocks * sizeof(double) + 16;

// The list as bytes: its tensors, where their units begin, and the coarse index of the units.
// Tensors are compared as bytes, so their struct must have no padding.
template <class Tensor>
std::vector<char> table_bytes(const std::vector<Tensor>& tensors, Table<Tensor>* table) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  std::vector<int64_t> first(count + 1);
  for (int64_t i = 0; i < count; ++i)
    first[i + 1] = first[i] + units_of(tensors[i].numel, table->unit);
  table->count = count;
  table->units = first[count];
  for (table->stride = 0; table->units >> table->stride > 2 * count;) ++table->stride;
  std::vector<int32_t> coarse((table->units >> table->stride) + 2, static_cast<int32_t>(count - 1));
  for (int64_t i = 0, k = 0; i < count; ++i) {
    for (; (k << table->stride) < first[i + 1]; ++k) coarse[k] = static_cast<int32_t>(i);
  }
  const size_t sizes[] = {count * sizeof(Tensor), first.size() * sizeof(int64_t),
                          coarse.size() * sizeof(int32_t)};
  std::vector<char> bytes(sizes[0] + sizes[1] + sizes[2]);
  if (count > 0) std::memcpy(bytes.data(), tensors.data(), sizes[0]);
  std::memcpy(bytes.data() + sizes[0], first.data(), sizes[1]);
  std::memcpy(bytes.data() + sizes[0] + sizes[1], coarse.data(), sizes[2]);
  return bytes;
}

// The largest unit that leaves one for each of `warps`.
template <class Tensor>
int32_t unit_for(const std::vector<Tensor>& tensors, int64_t warps) {
  for (int32_t unit = kMostUnit; unit > kLeastUnit; --unit) {
    int64_t units = 0;
    for (const Tensor& tensor : tensors) units += units_of(tensor.numel, unit);
    if (units >= warps) return unit;
  }
  return kLeastUnit;
}

// All launches of one op.
class TableCache {
 public:
  template <class... Kernels>
  explicit TableCache(const char* op, Kernels... kernels)
      : op_(op), kernels_{reinterpret_cast<const void*>(kernels)...} {}

  // The list to a kernel, in one launch. The lock is held until it is queued: another thread must
  // not refresh the slot before, nor use the scratch of a stream in between.
  template <class Tensor, class... Params, class... Args>
  void launch(void (*kernel)(List<Tensor>, Params...), const std::vector<Tensor>& tensors,
              const Queue& queue, const Args&... args) {
    static_assert((sizeof(List<Tensor>) + ... + (sizeof(Params) + 8)) <= 4096,
                  "what parameters may hold");
    const std::lock_guard<std::mutex> lock(mutex_);
    const BesideCapture beside;
    // torch's runtime and the one linked in here keep one each
    check(cudaSetDevice(queue.device), "selecting the device");
    const cudaStream_t stream = static_cast<cudaStream_t>(queue.stream);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &capture), "asking for a capture");
    const bool captured = capture != cudaStreamCaptureStatusNone;
    const int64_t most = resident_blocks(reinterpret_cast<const void*>(kernel), queue.device);

    List<Tensor> list;
    list.table.unit = unit_for(tensors, most * kWarps);
    const std::vector<char> bytes = table_bytes(tensors, &list.table);
    list.table.data = nullptr;
    if (bytes.size() <= sizeof(list.bytes)) {
      std::memcpy(list.bytes, bytes.data(), bytes.size());
    } else {
      list.table.data = captured ? keep(bytes) : ring_for(bytes.size(), queue).place(bytes);
    }
    char* const scratch = captured ? keep(std::vector<char>(kScratch)) : scratch_of(queue);
    list.table.partials = reinterpret_cast<double*>(scratch);
    list.table.finished = reinterpret_cast<uint32_t*>(scratch + kMaxBlocks * sizeof(double));

    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::clamp<int64_t>(list.table.units, 1, most)));
    config.blockDim = dim3(kBlock);
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, list, args...), "launching the kernel");
  }

 private:
  void check(cudaError_t error, const char* what) const { check_cuda(error, op_, what); }

  // As many blocks as the device holds at once. All kernels of the op are looked up when the first
  // is needed: code is loaded when it is first asked for, and a capture may not be the place for
  // it.
  int64_t resident_blocks(const void* kernel, int32_t device) {
    const auto found = resident_.find({kernel, device});
    if (found != resident_.end()) return found->second;
    int processors = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "asking a device");
    for (const void* each : kernels_) {
      cudaFuncAttributes attributes;
      const cudaError_t loaded = cudaFuncGetAttributes(&attributes, each);
      if (loaded == cudaErrorNoKernelImageForDevice || loaded == cudaErrorInvalidDeviceFunction)
        refuse(device);
      check(loaded, "loading a kernel");
      int blocks = 0;
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, each, kBlock, 0),
            "asking for occupancy");
      resident_[{each, device}] =
          std::clamp<int64_t>(static_cast<int64_t>(processors) * blocks, 1, kMaxBlocks);
    }
    return resident_.at({kernel, device});
  }

  [[noreturn]] void refuse(int32_t device) const {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string capability = std::to_string(major) + "." + std::to_string(minor);
    throw std::runtime_error(
        std::string("sfron_fast::") + op_ +
        ": expected a device that this build has code for, found compute capability " + capability +
        "; build with TORCH_CUDA_ARCH_LIST=" + capability);
  }

  // One ring for all lengths up to a power of two.
  Ring& ring_for(size_t length, const Queue& queue) {
    size_t size = 4096;
    while (size < length) size *= 2;
    for (Ring& ring : rings_) {
      if (ring.serves(size, queue)) return ring;
    }
    return rings_.emplace_back(op_, size, queue);
  }

  // Of a stream, whose kernels run one after the other: each leaves the counter at 0.
  char* scratch_of(const Queue& queue) {
    char*& scratch = scratch_[{queue.device, queue.stream}];
    if (scratch != nullptr) return scratch;
    char* fresh = nullptr;
    check(cudaMalloc(reinterpret_cast<void**>(&fresh), kScratch), "allocating memory");
    check(cudaMemsetAsync(fresh, 0, kScratch, static_cast<cudaStream_t>(queue.stream)),
          "clearing memory");
    return scratch = fresh;
  }

  // A copy for a captured graph: small, and owned by whoever may still replay it, so kept until the
  // process ends.
  char* keep(const std::vector<char>& bytes) {
    char* device = nullptr;
    cudaStream_t side = nullptr;
    check(cudaMalloc(reinterpret_cast<void**>(&device), bytes.size()),
          "allocating memory under capture");
    check(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking),
          "creating a stream under capture");
    cudaError_t error =
        cudaMemcpyAsync(device, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, side);
    const cudaError_t done = cudaStreamSynchronize(side);
    if (error == cudaSuccess) error = done;
    cudaStreamDestroy(side);
    check(error, "placing a table under capture");
    return device;
  }

  const char* op_;
  std::vector<const void*> kernels_;
  std::mutex mutex_;
  std::map<std::pair<const void*, int32_t>, int64_t> resident_;  // by kernel and device
  std::map<std::pair<int32_t, void*>, char*> scratch_;           // by device and stream
  std::deque<Ring> rings_;
};

}  // namespace sfron
