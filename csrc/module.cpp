// The Python module `sfron_fast._C`. Importing it runs the static registrations of every
// <op>_op.cpp, which hand the native kernels to the dispatcher; the ops themselves are defined in
// sfron_fast/ops.py. What Python calls besides them are quick looks at long lists, which the
// interpreter would take one by one (sfron_fast/_native.py documents them).
//
// Tensors are read through torch's DLPack exchange table, the C function that
// `torch.Tensor.__dlpack_c_exchange_api__` publishes for this purpose: no reference is counted,
// nothing is allocated.
#include <Python.h>

#include <cstdint>
#include <cstring>

#include "common/check.h"
#include "common/records.h"

namespace sfron {
namespace {

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

constexpr int32_t kDlCpu = 1, kDlCuda = 2;
constexpr uint8_t kDlInt = 0, kDlUnsigned = 1, kDlFloat = 2, kDlBFloat = 4;

struct Torch {
  PyObject *tensor = nullptr, *parameter = nullptr;  // the types
  const DlExchange* exchange = nullptr;
};

PyObject* attribute_of(const char* module, const char* name) {
  PyObject* imported = PyImport_ImportModule(module);
  PyObject* found = imported == nullptr ? nullptr : PyObject_GetAttrString(imported, name);
  Py_XDECREF(imported);
  return found;
}

// Looked up once. Without an exchange table of a version known here nothing is ever described: the
// ops take handles.
const Torch& torch_types() {
  static const Torch known = [] {
    Torch t;
    t.tensor = attribute_of("torch", "Tensor");
    t.parameter = attribute_of("torch.nn", "Parameter");
    PyObject* capsule = t.tensor == nullptr
                            ? nullptr
                            : PyObject_GetAttrString(t.tensor, "__dlpack_c_exchange_api__");
    const void* table =
        capsule == nullptr ? nullptr : PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_XDECREF(capsule);
    PyErr_Clear();
    const DlExchange* exchange = static_cast<const DlExchange*>(table);
    if (exchange != nullptr && exchange->major == 1 && exchange->look != nullptr)
      t.exchange = exchange;
    return t;
  }();
  return known;
}

int32_t dtype_code(const DlTensor& t) {
  const DTypeCodes& c = codes();
  if (t.lanes != 1) return -1;
  if (t.type == kDlFloat)
    return t.bits == 32 ? c.float32 : t.bits == 16 ? c.float16 : t.bits == 64 ? c.float64 : -1;
  if (t.type == kDlBFloat && t.bits == 16) return c.bfloat16;
  if (t.type == kDlUnsigned && t.bits == 8) return c.uint8;
  if (t.type == kDlInt && t.bits == 64) return c.int64;
  return -1;
}

// Whether a tensor's memory holds its values with the other sign (torch._neg_view, z.conj().imag).
// Only its dispatch keys tell. `is_neg` would take as long as all else that is looked at, so the
// keys are read where torch keeps them, some words behind the sizes. `learn_keys` finds out where,
// on tensors whose keys Python tells; where it could not, all are asked.
struct KeyPlace {
  int64_t gap =
      -1;  // bytes from sizes to strides: of those that lie in the tensor itself, not beside it
  int64_t words = 0;      // from the sizes to the keys; 0 = not known
  uint64_t negative = 0;  // the bit
} key_place;

int64_t gap_of(const DlTensor& t) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.strides) -
                              reinterpret_cast<uintptr_t>(t.sizes));
}

uint64_t word_behind(const DlTensor& t, int64_t words) {
  uint64_t word;
  std::memcpy(&word, t.sizes + words, sizeof(word));
  return word;
}

bool maybe_negated(PyObject* object, const DlTensor& t) {
  if (key_place.words != 0 && gap_of(t) == key_place.gap)
    return word_behind(t, key_place.words) & key_place.negative;
  PyObject* answer = PyObject_CallMethod(object, "is_neg", nullptr);
  const bool plain = answer == Py_False;
  Py_XDECREF(answer);
  PyErr_Clear();
  return !plain;
}

// (plain, its keys, negated, its keys): two tensors of one dimension and the words that hold their
// keys.
PyObject* learn_keys(PyObject*, PyObject* args) {
  PyObject* objects[2];
  unsigned long long keys[2];
  if (!PyArg_ParseTuple(args, "OKOK:learn_keys", &objects[0], &keys[0], &objects[1], &keys[1]))
    return nullptr;
  const Torch& torch = torch_types();
  DlTensor t[2];
  for (int i = 0; i < 2; ++i) {
    if (torch.exchange != nullptr && torch.exchange->look(objects[i], &t[i]) == 0) continue;
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  for (int64_t words = 1; words < 16 && keys[0] != keys[1] && gap_of(t[0]) == gap_of(t[1]);
       ++words) {
    if (word_behind(t[0], words) != keys[0]) continue;
    if (word_behind(t[1], words) != keys[1]) break;
    key_place = {gap_of(t[0]), words, keys[1] & ~keys[0]};
    Py_RETURN_TRUE;
  }
  Py_RETURN_FALSE;
}

// False for what the plain path should not meet: subclasses, transforms, other devices or dtypes,
// memory without values.
bool look(const Torch& torch, PyObject* object, Record* record) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != torch.parameter && type != torch.tensor) return false;
  DlTensor t;
  if (torch.exchange->look(object, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  const int32_t code = dtype_code(t);
  if (code < 0) return false;
  int32_t device_type = codes().cpu;
  if (t.device_type != kDlCpu) {
#if defined(USE_CUDA)
    if (t.device_type != kDlCuda) return false;
    device_type = aoti_torch_device_type_cuda();
#else
    return false;
#endif
  }
  int64_t numel = 1, expected = 1;
  for (int32_t d = 0; d < t.dim; ++d) numel *= t.sizes[d];
  if (maybe_negated(object, t) || (t.data == nullptr && numel != 0))
    return false;  // or a zero tensor, freed storage
  bool contiguous = true;
  for (int32_t d = t.dim; d-- > 0 && numel != 0;) {
    if (t.sizes[d] == 1) continue;
    contiguous = contiguous && t.strides[d] == expected;
    expected *= t.sizes[d];
  }
  *record = {
      static_cast<char*>(t.data) + t.byte_offset,   numel,     t.dim, t.sizes, code, device_type,
      t.device_type == kDlCpu ? 0 : t.device_index, contiguous};
  return true;
}

// How the lists can be served (sfron_fast/ops/native.py has the same numbers).
enum Served : int { kByHandles = 0, kByTable = 1, kByCopies = 2 };

// Records of one list: of its tensors, or, if it is a tensor itself, those that were written there
// before. False for a list that cannot be described. Clears `plain` if a tensor is not contiguous
// or of fp64, which no native kernel takes.
bool describe_list(const Torch& torch, PyObject* list, Record*& record, int64_t& room,
                   int64_t* count, bool& plain) {
  Record table;
  const bool known = !PyList_Check(list);
  if (known && !look(torch, list, &table)) return false;
  *count = known ? table.numel / kRecordWords : PyList_Size(list);
  if ((room -= *count * kRecordWords) < 0) {
    PyErr_SetString(PyExc_ValueError,
                    "table: expected a table with room for all lists, found a shorter one");
    return false;
  }
  if (known) std::memcpy(record, table.data, *count * sizeof(Record));
  const int32_t float64 = codes().float64;
  for (Py_ssize_t i = 0; i < *count; ++i, ++record) {
    if (!known && !look(torch, PyList_GetItem(list, i), record)) return false;
    plain = plain && record->contiguous && record->code != float64;
  }
  return true;
}

PyObject* describe(PyObject*, PyObject* args) {
  PyObject *target, *lists;
  if (!PyArg_ParseTuple(args, "OO!:describe", &target, &PyTuple_Type, &lists)) return nullptr;
  const Torch& torch = torch_types();
  Record table;
  if (torch.exchange == nullptr || !look(torch, target, &table)) return PyLong_FromLong(kByHandles);
  const Py_ssize_t count = PyTuple_Size(lists);
  int64_t* counts = static_cast<int64_t*>(table.data);
  Record* record = reinterpret_cast<Record*>(counts + count);
  int64_t room = table.numel - count;
  bool plain = true;
  for (Py_ssize_t l = 0; l < count; ++l) {
    if (describe_list(torch, PyTuple_GetItem(lists, l), record, room, counts + l, plain)) continue;
    if (PyErr_Occurred() != nullptr) return nullptr;
    return PyLong_FromLong(kByHandles);
  }
  return PyLong_FromLong(plain ? kByTable : kByCopies);
}

// A tensor's own lines, as far as the record of an earlier step tells where they were. A wrong hint
// does no harm.
void prefetch_tensor(const Record& then) {
#if defined(__GNUC__)
  const uintptr_t at =
      reinterpret_cast<uintptr_t>(then.sizes);  // not a pointer: what it was once may be gone
  for (int line = 0; line < 3; ++line)
    __builtin_prefetch(reinterpret_cast<const void*>(at + 64 * line - 64));
#endif
}

// In one pass, as each tensor is several cache lines far apart: its record, its gradient, and that
// one's record.
PyObject* gather(PyObject*, PyObject* args) {
  PyObject *params, *targets[2];
  if (!PyArg_ParseTuple(args, "O!OO:gather", &PyList_Type, &params, &targets[0], &targets[1]))
    return nullptr;
  static PyObject* const name = PyUnicode_InternFromString("grad");
  const Torch& torch = torch_types();
  const Py_ssize_t size = PyList_Size(params);
  Record tables[2];
  for (int i = 0; i < 2; ++i) {
    if (torch.exchange == nullptr || !look(torch, targets[i], &tables[i])) Py_RETURN_NONE;
    if (tables[i].numel < size * kRecordWords) {
      PyErr_SetString(PyExc_ValueError,
                      "table: expected tables with room for all parameters, found shorter ones");
      return nullptr;
    }
  }
  Record* const of_param = static_cast<Record*>(tables[0].data);
  Record* const of_grad = static_cast<Record*>(tables[1].data);
  PyObject* grads = PyList_New(size);
  for (Py_ssize_t i = 0; grads != nullptr && i < size; ++i) {
    if (i + static_cast<Py_ssize_t>(kSoon) < size) {
      prefetch_tensor(of_param[i + kSoon]);
      prefetch_tensor(of_grad[i + kSoon]);
    }
    PyObject* param = PyList_GetItem(
        params, i);  // null: a mode that saw the look-up before this has shortened the list
    const bool known = param != nullptr && look(torch, param, of_param + i);
    PyObject* grad = known ? PyObject_GetAttr(param, name) : nullptr;
    if (grad != nullptr) PyList_SetItem(grads, i, grad);
    const bool usable = grad != nullptr && look(torch, grad, of_grad + i);
    if (usable && of_param[i].contiguous && of_grad[i].contiguous) continue;
    Py_DECREF(grads);
    if (PyErr_Occurred() != nullptr) return nullptr;
    Py_RETURN_NONE;
  }
  return grads;
}

// Of a tensor that `look` knows, on the CPU; any other stays as it is.
PyObject* ask_huge_pages(PyObject*, PyObject* args) {
  PyObject* tensor;
  long long bytes;
  if (!PyArg_ParseTuple(args, "OL:ask_huge_pages", &tensor, &bytes)) return nullptr;
  const Torch& torch = torch_types();
  Record record;
  const bool known = torch.exchange != nullptr && look(torch, tensor, &record);
  if (known && record.device_type == codes().cpu) want_huge_pages(record.data, bytes);
  Py_RETURN_NONE;
}

PyObject* same(PyObject*, PyObject* args) {
  PyObject *a, *b;
  if (!PyArg_ParseTuple(args, "O!O!:same", &PyList_Type, &a, &PyList_Type, &b)) return nullptr;
  const Py_ssize_t size = PyList_Size(a);
  if (PyList_Size(b) != size) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (PyList_GetItem(a, i) != PyList_GetItem(b, i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyObject* same_values(PyObject*, PyObject* args) {
  PyObject *dicts, *values;
  if (!PyArg_ParseTuple(args, "O!O!:same_values", &PyList_Type, &dicts, &PyList_Type, &values))
    return nullptr;
  const Py_ssize_t size = PyList_Size(dicts), total = PyList_Size(values);
  Py_ssize_t seen = 0;
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject *dict = PyList_GetItem(dicts, i), *value;
    if (!PyDict_Check(dict)) Py_RETURN_FALSE;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, nullptr, &value);) {
      if (seen == total || PyList_GetItem(values, seen++) != value) Py_RETURN_FALSE;
    }
  }
  return PyBool_FromLong(seen == total);
}

PyMethodDef functions[] = {
    {"describe", describe, METH_VARARGS, "describe(table, lists) -> int"},
    {"gather", gather, METH_VARARGS, "gather(params, records, records) -> list | None"},
    {"ask_huge_pages", ask_huge_pages, METH_VARARGS, "ask_huge_pages(tensor, bytes)"},
    {"learn_keys", learn_keys, METH_VARARGS, "learn_keys(plain, keys, negated, keys) -> bool"},
    {"same", same, METH_VARARGS, "same(list, list) -> bool"},
    {"same_values", same_values, METH_VARARGS, "same_values(dicts, list) -> bool"},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "Native kernels of sfron_fast.",
                          -1,
                          functions,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace
}  // namespace sfron

extern "C" PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&sfron::definition);
}
