#pragma once
// Registers an op over lists of tensors: SFRON_LIST_OP("name_", function), for a function whose
// first arguments are `const TensorList&`. It serves both devices, and as `name_.table` a table
// in place of the lists (host/table.h).
#include "host/cuda.h"
#include "host/lists.h"

#define SFRON_LIST_OP(name, function)                                                    \
  STABLE_TORCH_LIBRARY_IMPL(sfron_fast, CPU, m) {                                        \
    m.impl(name, TORCH_BOX(&function));                                                  \
  }                                                                                      \
  SFRON_CUDA_OP(name, function)                                                          \
  STABLE_TORCH_LIBRARY_IMPL(sfron_fast, CompositeExplicitAutograd, m) {                  \
    m.impl(name ".table", TORCH_BOX((&FromTable<&function, decltype(function)>::call))); \
  }

namespace sfron {

// The `count` lists of a table, which Python made as one int64 tensor.
inline std::vector<TensorList> lists_of(const Tensor& table, size_t count) {
  const View view = any_view({"table"}, table.get());
  check_dtype({"table"}, view, codes().int64);
  const int64_t* counts = static_cast<const int64_t*>(view.data);
  const TableRow* row = reinterpret_cast<const TableRow*>(counts + count);
  int64_t room = view.numel - static_cast<int64_t>(count);
  std::vector<TensorList> lists;
  lists.reserve(count);
  for (size_t l = 0; l < count; ++l) {
    room -= l > static_cast<size_t>(view.numel) ? 0 : counts[l] * kRowWords;
    if (room < 0) fail({"table"}, "a table by _C.describe", "a shorter one");
    lists.emplace_back(row, static_cast<size_t>(counts[l]));
    row += counts[l];
  }
  return lists;
}

// R f(const TensorList&, ..., rest...) as R call(table, rest...); the lists are peeled off the
// signature one by one.
template <auto F, class Signature, size_t kLists = 0>
struct FromTable;

template <auto F, size_t kLists, class R, class... Rest>
struct FromTable<F, R(const TensorList&, Rest...), kLists> : FromTable<F, R(Rest...), kLists + 1> {
};

template <auto F, size_t kLists, class R, class... Rest>
struct FromTable<F, R(Rest...), kLists> {
  static R call(const Tensor& table, Rest... rest) {
    return run(lists_of(table, kLists), std::make_index_sequence<kLists>(), rest...);
  }

 private:
  template <size_t... I>
  static R run(const std::vector<TensorList>& lists, std::index_sequence<I...>, Rest... rest) {
    return F(lists[I]..., rest...);
  }
};

}  // namespace sfron
