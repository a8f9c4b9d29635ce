// The Python module `sfron_fast._C`. Importing it runs the static registrations of every
// <op>_op.cpp, which hand the native kernels to the dispatcher; the ops themselves are defined in
// sfron_fast/ops/registry.py. What Python calls besides them are quick looks at long lists, which
// the interpreter would take one by one.
#include "host/module.h"

#include <Python.h>

namespace sfron {
namespace {

PyMethodDef functions[] = {
    {"describe", describe, METH_VARARGS, "describe(table, lists) -> int"},
    {"gather", gather, METH_VARARGS,
     "gather(params, table, table, params=, table=) -> list | None"},
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
