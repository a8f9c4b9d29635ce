#pragma once
// A list of tensors as a table of plain numbers. torch's boxing makes a handle on the heap for
// every tensor of a list, which takes longer than a step on a tensor of 64 elements; `_C.describe`
// writes the numbers straight from the Python objects (host/describe.cpp), and the `table` overload
// of an op reads them.
#include <cstdint>

namespace sfron {

// Of one tensor. Valid while the tensor lives and keeps its shape: for the one call it was written
// for.
struct TableRow {
  void* data;
  int64_t numel, dim;
  const int64_t* sizes;  // [dim], borrowed from the tensor
  int32_t code;          // the shim's dtype
  int32_t device_type, device_index;
  int32_t contiguous;
};

// A table is int64: a count for each list, then the rows of all.
constexpr int64_t kRowWords = sizeof(TableRow) / sizeof(int64_t);
static_assert(sizeof(TableRow) == 48, "sfron_fast/ops/native.py allocates as many");

}  // namespace sfron
