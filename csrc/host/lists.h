#pragma once
// Lists of tensors that belong to another list: gradients, states, masks, step counts.
#include "host/check.h"

namespace sfron {

// A state has the dtype of its parameter or fp32; beside fp32 also bf16. Codes of moments are int8,
// or uint8 of squares; corrections int8 or int16.
enum class Allowed { kSame, kState, kFloat32, kSigned, kUnsigned, kInt16, kCorrection };

inline int64_t element_bytes(int32_t code) {
  const DTypeCodes& c = codes();
  if (code == c.uint8 || code == c.int8) return 1;
  return code == c.float32 ? 4 : 2;
}

inline void check_allowed(Name name, const View& view, int32_t like, Allowed allowed) {
  const DTypeCodes& c = codes();
  if (allowed == Allowed::kSigned) return check_dtype(name, view, c.int8);
  if (allowed == Allowed::kUnsigned) return check_dtype(name, view, c.uint8);
  if (allowed == Allowed::kInt16) return check_dtype(name, view, c.int16);
  if (allowed == Allowed::kCorrection) {
    if (view.code == c.int8 || view.code == c.int16) return;
    fail(name, "dtype torch.int16 or torch.int8", dtype_name(view.code));
  }
  const int32_t float32 = codes().float32, expected = allowed == Allowed::kFloat32 ? float32 : like;
  const int32_t other = like == float32 ? codes().bfloat16 : float32;
  if (view.code == expected || (allowed == Allowed::kState && view.code == other)) return;
  const std::string narrower =
      dtype_name(like == float32 ? other : like) + " or " + dtype_name(float32);
  fail(name, "dtype " + (allowed == Allowed::kState ? narrower : dtype_name(expected)),
       dtype_name(view.code));
}

// A list may come as one flat tensor: its tensors one after another, each from a multiple of 64
// elements. One handle then stands for thousands.
inline bool is_flat(const TensorList& tensors, const Views& like) {
  return tensors.size() == 1 && like.size() > 1;
}

inline int64_t flat_size(const Views& like) {
  int64_t size = 0;
  for (const View& view : like) size += (view.numel + kUnit - 1) / kUnit * kUnit;
  return size;
}

inline View flat_view(const char* name, const TensorList& tensors, const Views& like,
                      int64_t size) {
  const View view = any_view({name, 0}, tensors[0]);
  if (view.dim != 1 || view.numel != size) {
    fail({name},
         std::to_string(like.size()) + " tensors, or a flat one of shape (" + std::to_string(size) +
             ",)",
         "one of shape " + shape_name(view.sizes, view.dim));
  }
  return view;
}

// One tensor for each of `like`, of its shape and of a dtype that allowed(i) says; or a flat list.
template <class AllowedOf>
Arrays arrays_of(const char* name, const TensorList& tensors, const Views& like,
                 const AllowedOf& allowed) {
  Arrays arrays(like.size());
  if (is_flat(tensors, like)) {
    const View view = flat_view(name, tensors, like, flat_size(like));
    char* data = static_cast<char*>(view.data);
    for (size_t i = 0; i < like.size(); ++i) {
      // what holds beside one tensor holds beside the next of its kind
      if (i == 0 || like[i].code != like[i - 1].code || allowed(i) != allowed(i - 1))
        check_allowed({name, 0}, view, like[i].code, allowed(i));
      arrays[i] = {data, view.dtype, element_bytes(view.code)};
      data += (like[i].numel + kUnit - 1) / kUnit * kUnit * arrays[i].bytes;
    }
    return arrays;
  }
  if (tensors.size() != like.size()) {
    fail({name}, std::to_string(like.size()) + " tensors", std::to_string(tensors.size()));
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Name where{name, static_cast<int64_t>(i)};
    const View view = any_view(where, tensors[i]);
    check_shape_like(where, view, like[i]);
    check_allowed(where, view, like[i].code, allowed(i));
    arrays[i] = {view.data, view.dtype, element_bytes(view.code)};
  }
  return arrays;
}

inline Arrays arrays_like(const char* name, const TensorList& tensors, const Views& like,
                          Allowed allowed) {
  return arrays_of(name, tensors, like, [&](size_t) { return allowed; });
}

// An empty list = absent, and stays empty.
inline Arrays optional_arrays_like(const char* name, const TensorList& tensors, const Views& like,
                                   Allowed allowed) {
  return tensors.empty() ? Arrays() : arrays_like(name, tensors, like, allowed);
}

// as sfron_fast/ops/arguments.py says
constexpr const char* kPacked = "packed bits in uint8, as functional.pack_bits makes them of bool";

// The packed mask of each tensor, null = every weight is selected; an empty list = no masks.
inline std::vector<const uint8_t*> mask_views(const TensorList& masks, const Views& like) {
  std::vector<const uint8_t*> bytes;
  if (masks.empty()) return bytes;
  bytes.resize(like.size());
  if (is_flat(masks, like)) {
    const View view = flat_view("masks", masks, like, flat_size(like) / 8);
    if (view.code != codes().uint8) fail({"masks", 0}, kPacked, dtype_name(view.code));
    const uint8_t* data = static_cast<const uint8_t*>(view.data);
    for (size_t i = 0; i < like.size(); data += (like[i++].numel + kUnit - 1) / kUnit * (kUnit / 8))
      bytes[i] = data;
    return bytes;
  }
  if (masks.size() != like.size()) {
    fail({"masks"}, std::to_string(like.size()) + " tensors", std::to_string(masks.size()));
  }
  for (size_t i = 0; i < masks.size(); ++i) {
    const Name where{"masks", static_cast<int64_t>(i)};
    const View view = any_view(where, masks[i]);
    const int64_t size = (like[i].numel + 7) / 8;
    if (view.code != codes().uint8) fail(where, kPacked, dtype_name(view.code));
    if (view.dim != 1 || (view.numel != 0 && view.numel != size)) {
      fail(where,
           std::to_string(size) + " bytes for " + std::to_string(like[i].numel) +
               " weights (or 0 bytes: no mask)",
           shape_name(view.sizes, view.dim));
    }
    bytes[i] = view.numel == 0 ? nullptr : static_cast<const uint8_t*>(view.data);
  }
  return bytes;
}

// One fp32 scalar for each of `like`, or all of them in one flat tensor [tensors].
inline std::vector<float*> scalar_views(const char* name, const TensorList& scalars,
                                        const Views& like) {
  std::vector<float*> views(like.size());
  if (is_flat(scalars, like)) {
    const View view = flat_view(name, scalars, like, static_cast<int64_t>(like.size()));
    if (view.code != codes().float32) fail({name, 0}, "float32", dtype_name(view.code));
    for (size_t i = 0; i < like.size(); ++i) views[i] = static_cast<float*>(view.data) + i;
    return views;
  }
  if (scalars.size() != like.size()) {
    fail({name}, std::to_string(like.size()) + " tensors", std::to_string(scalars.size()));
  }
  for (size_t i = 0; i < like.size(); ++i)
    views[i] = scalar_view({name, static_cast<int64_t>(i)}, scalars[i]);
  return views;
}

}  // namespace sfron
