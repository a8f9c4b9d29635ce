// The Python module `sfron_fast._C` is empty: importing it runs the static registrations of every <op>_op.cpp,
// which hand the native kernels to the dispatcher. The ops themselves are defined in sfron_fast/ops.py.
#include <Python.h>

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", "Native kernels of sfron_fast.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};

extern "C" PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
