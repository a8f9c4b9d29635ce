// Whether long lists still hold the same objects.
#include "host/module.h"

namespace sfron {

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

}  // namespace sfron
