#pragma once
// What Python calls the dtypes and devices that the shim numbers, for messages.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cctype>
#include <string>

namespace sfron {

inline std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return text;
}

// "torch.int32". Most are C++'s names in lower case; the rest are called after C's types there.
inline std::string dtype_name(int32_t code) {
  using torch::headeronly::ScalarType;
  const auto type = static_cast<ScalarType>(code);
  switch (type) {
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::ComplexHalf:
      return "torch.complex32";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    default:
      break;
  }
  if (code < 0 || type >= ScalarType::Undefined) return "a dtype newer than this build";
  return "torch." + lower(torch::headeronly::toString(type));
}

// "cpu", "cuda:0".
inline std::string device_name(int32_t type, int32_t index) {
  using torch::headeronly::DeviceType;
  std::string name = "a device newer than this build";
#define SFRON_NAME(device, unused) \
  if (type == static_cast<int32_t>(DeviceType::device)) name = lower(#device);
  C10_FORALL_BACKEND_DEVICE_TYPES(SFRON_NAME, )
#undef SFRON_NAME
  const bool single = type == aoti_torch_device_type_cpu() || type == aoti_torch_device_type_meta();
  return single ? name : name + ":" + std::to_string(index);
}

}  // namespace sfron
