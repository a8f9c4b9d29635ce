#pragma once
// Which of its optional lists an op was given, as types: a kernel does not ask for it at every
// element.
#include <type_traits>
#include <vector>

namespace sfron {

// The tensor that tells which lists are there: torch's pointer to an empty tensor is null whether
// it is there or not.
template <class Tensor>
const Tensor& first_filled(const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors) {
    if (tensor.numel > 0) return tensor;
  }
  return tensors[0];
}

template <class Tensor>
bool any_filled(const std::vector<Tensor>& tensors) {
  return !tensors.empty() && first_filled(tensors).numel > 0;
}

// Whether a list has weights in two pieces or moments in codes: it then goes another way.
template <class Tensor>
bool any_compact(const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors) {
    if (tensor.is_compact()) return true;
  }
  return false;
}

// f(first, second) with two run-time flags as compile-time ones.
template <class F>
void with_flags(bool first, bool second, const F& f) {
  using Yes = std::true_type;
  using No = std::false_type;
  first ? (second ? f(Yes{}, Yes{}) : f(Yes{}, No{})) : (second ? f(No{}, Yes{}) : f(No{}, No{}));
}

}  // namespace sfron
