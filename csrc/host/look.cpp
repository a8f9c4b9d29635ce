#include "host/look.h"

#include <cstring>

#include "host/check.h"
#include "host/module.h"

namespace sfron {
namespace {

constexpr int32_t kDlCpu = 1, kDlCuda = 2;
constexpr uint8_t kDlInt = 0, kDlUnsigned = 1, kDlFloat = 2, kDlBFloat = 4;

PyObject* attribute_of(const char* module, const char* name) {
  PyObject* imported = PyImport_ImportModule(module);
  PyObject* found = imported == nullptr ? nullptr : PyObject_GetAttrString(imported, name);
  Py_XDECREF(imported);
  return found;
}

int32_t dtype_code(const DlTensor& t) {
  const DTypeCodes& c = codes();
  if (t.lanes != 1) return -1;
  if (t.type == kDlFloat)
    return t.bits == 32 ? c.float32 : t.bits == 16 ? c.float16 : t.bits == 64 ? c.float64 : -1;
  if (t.type == kDlBFloat && t.bits == 16) return c.bfloat16;
  if (t.type == kDlUnsigned && t.bits == 8) return c.uint8;
  if (t.type == kDlInt)
    return t.bits == 64 ? c.int64 : t.bits == 16 ? c.int16 : t.bits == 8 ? c.int8 : -1;
  return -1;
}

// Whether a tensor's memory holds its values with the other sign (torch._neg_view, z.conj().imag).
// Only its dispatch keys tell. `is_neg` would take as long as all else that is looked at, so the
// keys are read where torch keeps them, some words behind the sizes. `learn_keys` finds out where,
// on tensors whose keys Python tells; where it could not, all are asked.
struct KeyPlace {
  // bytes from sizes to strides: of those that lie in the tensor itself, not beside it
  int64_t gap = -1;
  int64_t words = 0;      // from the sizes to the keys; 0 = not known
  uint64_t negative = 0;  // the bit
} key_place;

// Bytes from a tensor to its sizes; 0 = not known.
uintptr_t sizes_begin = 0;

uintptr_t word_of(PyObject* object) {  // the first behind its head
  uintptr_t word;
  std::memcpy(&word, object + 1, sizeof word);
  return word;
}

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

}  // namespace

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

// (plain, its keys, negated, its keys): two tensors of one dimension and the words that hold their
// keys. Also learns whether an object's first word is a pointer to its tensor.
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
  const auto begin = [&](int i) {
    return reinterpret_cast<uintptr_t>(t[i].sizes) - word_of(objects[i]);
  };
  if (begin(0) == begin(1) && begin(0) >= 48 && begin(0) < 256) sizes_begin = begin(0);
  for (int64_t words = 1; words < 16 && keys[0] != keys[1] && gap_of(t[0]) == gap_of(t[1]);
       ++words) {
    if (word_behind(t[0], words) != keys[0]) continue;
    if (word_behind(t[1], words) != keys[1]) break;
    key_place = {gap_of(t[0]), words, keys[1] & ~keys[0]};
    Py_RETURN_TRUE;
  }
  Py_RETURN_FALSE;
}

const uintptr_t* words_of(PyObject* object) {
  return sizes_begin == 0 ? nullptr : reinterpret_cast<const uintptr_t*>(word_of(object));
}

bool look(const Torch& torch, PyObject* object, TableRow* row) {
  if (!torch.holds(object)) return false;
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
  *row = {
      static_cast<char*>(t.data) + t.byte_offset,   numel,     t.dim, t.sizes, code, device_type,
      t.device_type == kDlCpu ? 0 : t.device_index, contiguous};
  return true;
}

}  // namespace sfron
