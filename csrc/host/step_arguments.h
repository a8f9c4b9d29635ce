#pragma once
// What the optimizer steps share on the host: the checked arguments of both ops.
#include "formulas/clip.h"
#include "host/lists.h"

namespace sfron {

struct StepArguments {
  Views params;
  Arrays grads, slow_save, slow_from;
  std::vector<const uint8_t*> masks;
  StepInputs inputs;
};

inline int64_t* skipped_view(const MaybeTensor& skipped) {
  if (!skipped.has_value()) return nullptr;
  const View view = any_view({"skipped"}, skipped->get());
  if (view.numel != 1) fail({"skipped"}, "one element", shape_name(view.sizes, view.dim));
  check_dtype({"skipped"}, view, codes().int64);
  return static_cast<int64_t*>(view.data);
}

inline StepArguments step_arguments(const TensorList& params, const TensorList& grads,
                                    const TensorList& slow_save, const TensorList& slow_from,
                                    const TensorList& masks, const MaybeTensor& norm,
                                    const MaybeTensor& grad_scale, const MaybeTensor& found_inf,
                                    const StepNumbers& given, const MaybeTensor& numbers,
                                    const MaybeTensor& skipped, double max_norm, bool maximize) {
  StepArguments a{};
  a.params = float_views("params", params);
  a.grads = arrays_like("grads", grads, a.params, Allowed::kSame);
  a.slow_save = optional_arrays_like("slow_save", slow_save, a.params, Allowed::kSame);
  a.slow_from = optional_arrays_like("slow_from", slow_from, a.params, Allowed::kSame);
  a.masks = mask_views(masks, a.params);
  a.inputs.norm = optional_scalar_view("norm", norm);
  a.inputs.grad_scale = optional_scalar_view("grad_scale", grad_scale);
  a.inputs.found_inf = optional_scalar_view("found_inf", found_inf);
  a.inputs.numbers = numbers_view(numbers, 3);  // lr, weight_decay, slow_lr
  a.inputs.skipped = skipped_view(skipped);
  a.inputs.given = given;
  a.inputs.max_norm = static_cast<float>(max_norm);
  a.inputs.maximize = maximize;
  // what lies on another device cannot be read without waiting for it
  const StepNumbers known = wanted_device().type == codes().cpu ? step_numbers(a.inputs) : given;
  const double inf = std::numeric_limits<double>::infinity();
  check_number("lr", known.lr, 0.0, inf);
  check_number("weight_decay", known.weight_decay, 0.0, inf);
  if (max_norm != inf)
    check_number("max_norm", max_norm, 0.0, inf, true);  // inf: measured, not clipped
  check_number("slow_lr", known.slow_lr, 0.0, 1.0);
  return a;
}

// Element i of an optional list.
inline void* data_or_null(const Arrays& arrays, size_t i) {
  return arrays.empty() ? nullptr : arrays[i].data;
}

}  // namespace sfron
