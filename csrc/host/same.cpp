// Whether long lists still hold the same objects.
#include <cstring>

#include "cpu/runs.h"
#include "host/look.h"
#include "host/module.h"

namespace sfron {
namespace {

// Of a dict to come its object, of a nearer one what that points to: its keys are the word behind
// head, size and version; elsewhere it is a wrong hint.
void prefetch_dicts(PyObject* dicts, Py_ssize_t i, Py_ssize_t size) {
  constexpr Py_ssize_t soon = kSoon;
  if (i + 2 * soon < size)
    prefetch_at(reinterpret_cast<uintptr_t>(PyList_GetItem(dicts, i + 2 * soon)), 1);
  PyObject* dict = i + soon < size ? PyList_GetItem(dicts, i + soon) : nullptr;
  if (dict == nullptr || !PyDict_Check(dict)) return;
  uintptr_t words[3];
  std::memcpy(words, dict + 1, sizeof words);
  prefetch_at(words[2], 2);
}

}  // namespace

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
    prefetch_dicts(dicts, i, size);
    PyObject *dict = PyList_GetItem(dicts, i), *value;
    if (!PyDict_Check(dict)) Py_RETURN_FALSE;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, nullptr, &value);) {
      if (seen == total || PyList_GetItem(values, seen++) != value) Py_RETURN_FALSE;
    }
  }
  return PyBool_FromLong(seen == total);
}

}  // namespace sfron
