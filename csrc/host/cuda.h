#pragma once
// The side of a CUDA launch that knows torch: its tensors' device and torch's current stream there.
// An op has one body for both devices; it ends in a launch where `on_cuda()`, else in a parallel
// loop.
#include "host/check.h"

#if defined(USE_CUDA)
#include <dlfcn.h>

#define SFRON_CUDA_OP(name, function)              \
  STABLE_TORCH_LIBRARY_IMPL(sfron_fast, CUDA, m) { \
    m.impl(name, TORCH_BOX(&function));            \
  }
#else
#define SFRON_CUDA_OP(name, function)
#endif

namespace sfron {

#if defined(USE_CUDA)
// The stream shim is in libtorch_cuda, which a CPU build of torch lacks. Looked up when first
// needed and not linked, so that one wheel is built without a CUDA build of torch and loads, for
// its CPU kernels, where there is none.
inline void* current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* symbol =
        dlsym(library == nullptr ? RTLD_DEFAULT : library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<GetStream>(symbol);
  }();
  if (get == nullptr) fail({"device"}, "a build of torch with CUDA", "one without");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

// The device of an op's tensors. While it lives, the checks want all others there, new tensors lie
// there, and a CUDA device is the current one.
class DeviceScope {
 public:
  explicit DeviceScope(const TensorList& tensors) {
    if (tensors.empty()) return;
    const Device device = device_of(tensors[0]);
    if (device.type != aoti_torch_device_type_cuda()) return;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device.index, &guard_));
    wanted_device() = device;
  }
  DeviceScope(const DeviceScope&) = delete;
  ~DeviceScope() {
    if (guard_ == nullptr) return;
    wanted_device() = before_;
    aoti_torch_delete_device_guard(guard_);
  }

  bool on_cuda() const { return guard_ != nullptr; }
  Queue queue() const { return {wanted_device().index, current_stream(wanted_device().index)}; }

 private:
  Device before_ = wanted_device();
  DeviceGuardHandle guard_ = nullptr;
};
#else
struct DeviceScope {
  explicit DeviceScope(const TensorList&) {}
};
#endif

}  // namespace sfron
