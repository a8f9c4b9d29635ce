#pragma once
// What the optimizer steps share on the host: the checked arguments of both ops.
#include "formulas/clip.h"
#include "formulas/moment_codes.h"
#include "formulas/split_weights.h"
#include "host/lists.h"

namespace sfron {

// Weights beside the parameters: where a cycle starts, and what splits them in two pieces.
struct WeightLists {
  const TensorList &corrections, &slow_save, &slow_save_corrections, &slow_from,
      &slow_from_corrections;
};

struct StepArguments {
  Views params;
  Arrays grads, slow_save, slow_from;
  std::vector<WeightCorrections> corrections;  // of each parameter
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

// Element i of an optional list.
inline void* data_or_null(const Arrays& arrays, size_t i) {
  return arrays.empty() ? nullptr : arrays[i].data;
}

// Of slow weights, if there are any, the corrections in the dtype of the weights' own.
inline Arrays slow_corrections(const char* name, const TensorList& tensors, const TensorList& slow,
                               const Views& params, const Arrays& own) {
  const bool wanted = !slow.empty() && !own.empty();
  if (wanted != !tensors.empty()) {
    fail({name}, std::to_string(wanted ? params.size() : 0) + " tensors",
         std::to_string(tensors.size()));
  }
  return wanted ? arrays_of(name, tensors, params,
                            [&](size_t i) {
                              return own[i].bytes == 1 ? Allowed::kSigned : Allowed::kInt16;
                            })
                : Arrays();
}

inline std::vector<WeightCorrections> weight_corrections(const WeightLists& lists,
                                                         const Views& params) {
  std::vector<WeightCorrections> corrections(params.size());
  const Arrays own =
      optional_arrays_like("corrections", lists.corrections, params, Allowed::kCorrection);
  for (size_t i = 0; i < own.size(); ++i) {
    if (params[i].code != codes().bfloat16) {
      fail({"params", static_cast<int64_t>(i)}, "torch.bfloat16 beside corrections",
           dtype_name(params[i].code));
    }
  }
  const Arrays save = slow_corrections("slow_save_corrections", lists.slow_save_corrections,
                                       lists.slow_save, params, own);
  const Arrays from = slow_corrections("slow_from_corrections", lists.slow_from_corrections,
                                       lists.slow_from, params, own);
  for (size_t i = 0; i < own.size(); ++i)
    corrections[i] = {own[i].data, data_or_null(save, i), data_or_null(from, i), own[i].bytes};
  return corrections;
}

// Elements of one index of the first dimension.
inline int64_t row_of(const View& view) {
  return view.dim == 0 || view.sizes[0] == 0 ? 0 : view.numel / view.sizes[0];
}

// The scales of each parameter's moments, [first dimension, groups, kinds]; null where they are no
// codes.
inline std::vector<float*> scale_views(const TensorList& scales, const Views& params,
                                       int64_t kinds) {
  std::vector<float*> views(params.size());
  if (scales.empty()) return views;
  if (scales.size() != params.size()) {
    fail({"scales"}, std::to_string(params.size()) + " tensors or none",
         std::to_string(scales.size()));
  }
  for (size_t i = 0; i < scales.size(); ++i) {
    const Name where{"scales", static_cast<int64_t>(i)};
    const View view = any_view(where, scales[i]);
    if (view.numel == 0) continue;
    const int64_t row = row_of(params[i]);
    if (row == 0 || row % kCodedUnit != 0) {
      fail(where,
           "rows of a multiple of 32 elements beside codes, not " +
               shape_name(params[i].sizes, params[i].dim),
           "a scale");
    }
    const int64_t shape[] = {params[i].sizes[0], (row + kGroup - 1) / kGroup, kinds};
    check_shape(where, view, shape, 3);
    check_dtype(where, view, codes().float32);
    views[i] = static_cast<float*>(view.data);
  }
  return views;
}

// Codes where there are scales, else of a dtype that a state may have.
inline Arrays moments_like(const char* name, const TensorList& tensors, const Views& params,
                           const std::vector<float*>& scales, Allowed code) {
  return arrays_of(name, tensors, params,
                   [&](size_t i) { return scales[i] != nullptr ? code : Allowed::kState; });
}

inline StepArguments step_arguments(const TensorList& params, const TensorList& grads,
                                    const WeightLists& weights, const TensorList& masks,
                                    const MaybeTensor& norm, const MaybeTensor& grad_scale,
                                    const MaybeTensor& found_inf, const StepNumbers& given,
                                    const MaybeTensor& numbers, const MaybeTensor& skipped,
                                    double max_norm, bool maximize) {
  StepArguments a{};
  a.params = float_views("params", params);
  a.grads = arrays_like("grads", grads, a.params, Allowed::kSame);
  a.slow_save = optional_arrays_like("slow_save", weights.slow_save, a.params, Allowed::kSame);
  a.slow_from = optional_arrays_like("slow_from", weights.slow_from, a.params, Allowed::kSame);
  a.corrections = weight_corrections(weights, a.params);
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

}  // namespace sfron
