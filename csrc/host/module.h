#pragma once
// The functions that csrc/module.cpp gives to Python; sfron_fast/ops/native.py documents them.
#include <Python.h>

namespace sfron {

PyObject* describe(PyObject* module, PyObject* args);
PyObject* gather(PyObject* module, PyObject* args);
PyObject* ask_huge_pages(PyObject* module, PyObject* args);
PyObject* learn_keys(PyObject* module, PyObject* args);
PyObject* same(PyObject* module, PyObject* args);
PyObject* same_values(PyObject* module, PyObject* args);

}  // namespace sfron
