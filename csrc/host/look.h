#pragma once
// A Python tensor as a TableRow, read through torch's DLPack exchange table, the C function that
// `torch.Tensor.__dlpack_c_exchange_api__` publishes for this purpose: no reference is counted,
// nothing is allocated.
#include <Python.h>

#include <cstdint>

#include "host/table.h"

namespace sfron {

// The part of dlpack.h (version 1) that is needed; torch's copy is closed to extensions of the
// stable ABI.
struct DlTensor {
  void* data;
  int32_t device_type, device_index;
  int32_t dim;
  uint8_t type, bits;
  uint16_t lanes;
  const int64_t *sizes, *strides;
  uint64_t byte_offset;
};

struct DlExchange {
  uint32_t major, minor;
  void* previous;
  void *allocate, *from_object, *to_object;
  int (*look)(void* object, DlTensor* out);  // 0 = told; else a Python error is set
  void* current_stream;
};

// Lines of the cache that will be needed soon. An address that is none does no harm.
inline void prefetch_at([[maybe_unused]] uintptr_t address, [[maybe_unused]] int lines) {
#if defined(__GNUC__)
  for (int line = 0; line < lines; ++line)
    __builtin_prefetch(reinterpret_cast<const void*>(address + 64 * line));
#endif
}

struct Torch {
  PyObject *tensor = nullptr, *parameter = nullptr;  // the types
  const DlExchange* exchange = nullptr;

  // Whether there is an object, of the types themselves.
  bool holds(PyObject* object) const {
    if (object == nullptr) return false;
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == parameter || type == tensor;
  }
};

// Looked up once. Without an exchange table of a version known here nothing is ever described: the
// ops take handles.
const Torch& torch_types();

// The tensor that an object of the types `torch.holds` keeps a pointer to, as words, of which the
// first six may be read; null where it is not known how.
const uintptr_t* words_of(PyObject* object);

// False for what the plain path should not meet: subclasses, transforms, other devices or dtypes,
// memory without values.
bool look(const Torch& torch, PyObject* object, TableRow* row);

}  // namespace sfron
