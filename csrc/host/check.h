#pragma once
// The side that knows torch: checks arguments as sfron_fast/ops/arguments.py does, hands out raw
// pointers, opens the one parallel region. Every message names the argument, what was expected and
// what was found; checks come before writes. Lists may hold thousands of tensors, so each property
// is fetched once, through the C shim, and kept in a View.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/runs.h"
#include "formulas/scalar.h"
#include "host/fail.h"
#include "host/names.h"
#include "host/table.h"

namespace sfron {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// One tensor of a list: a handle, or a line of a table.
struct Item {
  Item(AtenTensorHandle handle) : handle(handle) {}
  explicit Item(const TableRow* row) : row(row) {}
  AtenTensorHandle handle = nullptr;
  const TableRow* row = nullptr;
};

// A list of tensors: a Tensor[] argument, or a part of a table. Owns bare handles: a vector of
// Tensors allocates a shared count for each, half of a call's cost.
class TensorList {
 public:
  explicit TensorList(StableListHandle list) {
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size_));
    handles_.resize(size_);
    for (size_t i = 0; i < size_; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      handles_[i] = torch::stable::detail::to<AtenTensorHandle>(item);
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  TensorList(const TableRow* rows, size_t size) : rows_(rows), size_(size) {}
  TensorList(TensorList&&) noexcept = default;
  TensorList(const TensorList&) = delete;
  ~TensorList() {
    for (const AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }

  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  Item operator[](size_t i) const { return rows_ == nullptr ? Item(handles_[i]) : Item(rows_ + i); }

 private:
  std::vector<AtenTensorHandle> handles_;
  const TableRow* rows_ = nullptr;
  size_t size_ = 0;
};

struct View {
  void* data;
  int64_t numel;
  int64_t dim;
  const int64_t* sizes;  // [dim], borrowed from the tensor
  int32_t code;          // the shim's dtype
  DType dtype;           // meaningful for float views
};
using Views = std::vector<View>;

// What is left to know of a tensor that was compared with a View.
struct Array {
  void* data;
  DType dtype;    // meaningful for floats
  int64_t bytes;  // of an element
};
using Arrays = std::vector<Array>;

struct DTypeCodes {
  int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float16 = aoti_torch_dtype_float16(), float64 = aoti_torch_dtype_float64();
  int32_t uint8 = aoti_torch_dtype_uint8(), int8 = aoti_torch_dtype_int8();
  int32_t int16 = aoti_torch_dtype_int16(), int64 = aoti_torch_dtype_int64();
  int32_t cpu = aoti_torch_device_type_cpu();
};

inline const DTypeCodes& codes() {
  static const DTypeCodes all;
  return all;
}

inline std::string dtype_name(DType dtype) {
  const DTypeCodes& c = codes();
  return dtype_name(dtype == DType::kFloat32    ? c.float32
                    : dtype == DType::kBFloat16 ? c.bfloat16
                                                : c.float16);
}

// Where the tensors of the running op must be: the CPU, unless a DeviceScope (host/cuda.h) says
// otherwise.
struct Device {
  int32_t type, index;
};

inline Device& wanted_device() {
  static thread_local Device device{codes().cpu, 0};
  return device;
}

// The device's index, or 0 where it has none.
inline Device device_of(Item item) {
  if (item.row != nullptr) return {item.row->device_type, item.row->device_index};
  Device device{codes().cpu, 0};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(item.handle, &device.type));
  if (device.type == codes().cpu) return device;
  if (aoti_torch_get_device_index(item.handle, &device.index) != TORCH_SUCCESS) device.index = 0;
  return device;
}

inline void check_device(Name name, Device found) {
  const Device wanted = wanted_device();
  if (found.type == wanted.type && (found.type == codes().cpu || found.index == wanted.index))
    return;
  fail(name, "device " + device_name(wanted.type, wanted.index),
       device_name(found.type, found.index));
}

inline void check_contiguous(Name name, bool contiguous) {
  if (!contiguous)
    fail(name, "a contiguous tensor", "other strides or none; use .contiguous() or .to_dense()");
}

// Contiguous, unless the caller takes its strides [dim].
inline View handle_view(Name name, AtenTensorHandle handle, int64_t** strides) {
  View view{};
  int64_t* sizes = nullptr;
  bool contiguous = false;
  const bool fetched = aoti_torch_get_dtype(handle, &view.code) == TORCH_SUCCESS &&
                       aoti_torch_get_dim(handle, &view.dim) == TORCH_SUCCESS &&
                       aoti_torch_get_sizes(handle, &sizes) == TORCH_SUCCESS &&
                       aoti_torch_get_numel(handle, &view.numel) == TORCH_SUCCESS &&
                       aoti_torch_is_contiguous(handle, &contiguous) == TORCH_SUCCESS &&
                       (!strides || aoti_torch_get_strides(handle, strides) == TORCH_SUCCESS);
  if (!fetched) fail(name, "a dense tensor", "one whose properties torch does not tell");
  view.sizes = sizes;
  check_device(name, device_of(handle));
  check_contiguous(name, contiguous || strides != nullptr);
  const bool told = aoti_torch_get_data_ptr(handle, &view.data) == TORCH_SUCCESS;
  if (!told || (view.data == nullptr && view.numel != 0)) {
    fail(name, "a tensor with memory", "none: a zero tensor, or one whose storage was freed");
  }
  return view;
}

inline View row_view(Name name, const TableRow& row) {
  check_device(name, {row.device_type, row.device_index});
  check_contiguous(name, row.contiguous != 0);
  return {row.data, row.numel, row.dim, row.sizes, row.code, DType::kFloat32};
}

// Any contiguous tensor on the wanted device.
inline View any_view(Name name, Item item, int64_t** strides = nullptr) {
  View view =
      item.row == nullptr ? handle_view(name, item.handle, strides) : row_view(name, *item.row);
  const DTypeCodes& c = codes();
  view.dtype = view.code == c.bfloat16  ? DType::kBFloat16
               : view.code == c.float16 ? DType::kFloat16
                                        : DType::kFloat32;
  return view;
}

inline View float_view(Name name, Item item, int64_t** strides = nullptr) {
  const View view = any_view(name, item, strides);
  const DTypeCodes& c = codes();
  if (view.code != c.float32 && view.code != c.bfloat16 && view.code != c.float16) {
    fail(name,
         "torch.float32, torch.bfloat16 or torch.float16 (float64 has only the reference kernels, "
         "through "
         "sfron_fast.functional)",
         dtype_name(view.code));
  }
  return view;
}

inline Views float_views(const char* name, const TensorList& tensors) {
  Views views(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i)
    views[i] = float_view({name, static_cast<int64_t>(i)}, tensors[i]);
  return views;
}

inline void check_shape(Name name, const View& view, const int64_t* sizes, int64_t dim) {
  if (view.dim == dim && std::memcmp(view.sizes, sizes, dim * sizeof(int64_t)) == 0) return;
  fail(name, "shape " + shape_name(sizes, dim), shape_name(view.sizes, view.dim));
}

// Where there is one dimension the count says it all: the sizes lie in the tensors, out of reach of
// the caches.
inline void check_shape_like(Name name, const View& view, const View& like) {
  if (view.dim == like.dim && view.numel == like.numel && like.dim <= 1) return;
  check_shape(name, view, like.sizes, like.dim);
}

inline void check_dtype(Name name, const View& view, int32_t code) {
  if (view.code != code) fail(name, "dtype " + dtype_name(code), dtype_name(view.code));
}

inline float* scalar_view(Name name, Item scalar) {
  const View view = any_view(name, scalar);
  if (view.numel != 1) fail(name, "one element", shape_name(view.sizes, view.dim));
  if (view.code != codes().float32) fail(name, "float32", dtype_name(view.code));
  return static_cast<float*>(view.data);
}

inline float* optional_scalar_view(const char* name, const MaybeTensor& scalar) {
  return scalar.has_value() ? scalar_view({name}, scalar->get()) : nullptr;
}

// [count] in fp64 beside the tensors, instead of as many numbers; null where the numbers are meant.
inline const double* numbers_view(const MaybeTensor& numbers, int64_t count) {
  if (!numbers.has_value()) return nullptr;
  const View view = any_view({"numbers"}, numbers->get());
  check_shape({"numbers"}, view, &count, 1);
  check_dtype({"numbers"}, view, codes().float64);
  return static_cast<const double*>(view.data);
}

// A number in [low, high], or `numbers` in its place; what lies on another device cannot be read
// without waiting for it.
inline Number number_view(const char* name, double given, const MaybeTensor& numbers, double low,
                          double high) {
  const Number number{given, numbers_view(numbers, 1)};
  check_number(name, wanted_device().type == codes().cpu ? value_of(number) : given, low, high);
  return number;
}

// A new contiguous tensor on the wanted device, uninitialised.
inline Tensor new_tensor(const std::vector<int64_t>& sizes, int32_t code) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;)
    strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), code, wanted_device().type,
                                                  wanted_device().index, &handle));
  Tensor tensor(handle);
  if (wanted_device().type == codes().cpu)
    want_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Work for one thread: below it a second one costs more to wake than it saves.
constexpr int64_t kGrain = 32768;  // elements

// The one parallel region of an op: f(begin, end) over pieces of [0, count), on torch's threads.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  isa();  // may refuse SFRON_FAST_ISA: here and not inside the region
  torch::stable::parallel_for(0, count, grain, f);
}

template <class F>
void parallel(const Runs& runs, const F& f) {
  parallel(runs.units(), std::max<int64_t>(kGrain / runs.unit(), 1), f);
}

}  // namespace sfron

// How torch's boxing makes a TensorList of a Tensor[] argument.
namespace torch::stable::detail {
template <>
struct ToImpl<sfron::TensorList> {
  static sfron::TensorList call(StableIValue value, uint64_t, bool) {
    return sfron::TensorList(to<StableListHandle>(value));
  }
};
}  // namespace torch::stable::detail
