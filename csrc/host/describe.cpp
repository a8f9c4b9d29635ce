// Tables of lists that lie in Python, written in one pass.
#include <cstring>

#include "cpu/pages.h"
#include "cpu/runs.h"
#include "host/check.h"
#include "host/look.h"
#include "host/module.h"

namespace sfron {
namespace {

// How the lists can be served (sfron_fast/ops/native.py has the same numbers).
enum Served : int { kByHandles = 0, kByTable = 1, kByCopies = 2 };

// A tensor's own lines, as far as the row of an earlier step tells where they were. A wrong hint
// does no harm.
void prefetch_tensor(const TableRow& then) {
#if defined(__GNUC__)
  // not a pointer: what it was once may be gone
  const uintptr_t at = reinterpret_cast<uintptr_t>(then.sizes);
  for (int line = 0; line < 3; ++line)
    __builtin_prefetch(reinterpret_cast<const void*>(at + 64 * line - 64));
#endif
}

// The rows of one list: of its tensors, or, if it is a tensor itself, those that were written there
// before. False for a list that cannot be described. Clears `plain` if a tensor is not contiguous
// or of fp64, which no native kernel takes.
bool describe_list(const Torch& torch, PyObject* list, TableRow*& row, int64_t& room,
                   int64_t* count, bool& plain) {
  TableRow table;
  const bool known = !PyList_Check(list);
  if (known && !look(torch, list, &table)) return false;
  *count = known ? table.numel / kRowWords : PyList_Size(list);
  if ((room -= *count * kRowWords) < 0) {
    PyErr_SetString(PyExc_ValueError,
                    "table: expected a table with room for all lists, found a shorter one");
    return false;
  }
  if (known) std::memcpy(row, table.data, *count * sizeof(TableRow));
  const int32_t float64 = codes().float64;
  for (Py_ssize_t i = 0; i < *count; ++i, ++row) {
    if (!known && i + static_cast<Py_ssize_t>(kSoon) < *count) prefetch_tensor(row[kSoon]);
    if (!known && !look(torch, PyList_GetItem(list, i), row)) return false;
    plain = plain && row->contiguous && row->code != float64;
  }
  return true;
}

}  // namespace

PyObject* describe(PyObject*, PyObject* args) {
  PyObject *target, *lists;
  if (!PyArg_ParseTuple(args, "OO!:describe", &target, &PyTuple_Type, &lists)) return nullptr;
  const Torch& torch = torch_types();
  TableRow table;
  if (torch.exchange == nullptr || !look(torch, target, &table)) return PyLong_FromLong(kByHandles);
  const Py_ssize_t count = PyTuple_Size(lists);
  int64_t* counts = static_cast<int64_t*>(table.data);
  TableRow* row = reinterpret_cast<TableRow*>(counts + count);
  int64_t room = table.numel - count;
  bool plain = true;
  for (Py_ssize_t l = 0; l < count; ++l) {
    if (describe_list(torch, PyTuple_GetItem(lists, l), row, room, counts + l, plain)) continue;
    if (PyErr_Occurred() != nullptr) return nullptr;
    return PyLong_FromLong(kByHandles);
  }
  return PyLong_FromLong(plain ? kByTable : kByCopies);
}

// In one pass, as each tensor is several cache lines far apart: its row, its gradient, and that
// one's row.
PyObject* gather(PyObject*, PyObject* args) {
  PyObject *params, *targets[2];
  if (!PyArg_ParseTuple(args, "O!OO:gather", &PyList_Type, &params, &targets[0], &targets[1]))
    return nullptr;
  static PyObject* const name = PyUnicode_InternFromString("grad");
  const Torch& torch = torch_types();
  const Py_ssize_t size = PyList_Size(params);
  TableRow tables[2];
  for (int i = 0; i < 2; ++i) {
    if (torch.exchange == nullptr || !look(torch, targets[i], &tables[i])) Py_RETURN_NONE;
    if (tables[i].numel < size * kRowWords) {
      PyErr_SetString(PyExc_ValueError,
                      "table: expected tables with room for all parameters, found shorter ones");
      return nullptr;
    }
  }
  TableRow* const of_param = static_cast<TableRow*>(tables[0].data);
  TableRow* const of_grad = static_cast<TableRow*>(tables[1].data);
  PyObject* grads = PyList_New(size);
  for (Py_ssize_t i = 0; grads != nullptr && i < size; ++i) {
    if (i + static_cast<Py_ssize_t>(kSoon) < size) {
      prefetch_tensor(of_param[i + kSoon]);
      prefetch_tensor(of_grad[i + kSoon]);
    }
    // null: a mode that saw the look-up before this has shortened the list
    PyObject* param = PyList_GetItem(params, i);
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

// Of the tables of parameters, of their gradients, and of the parameters as they were once.
PyObject* alike(PyObject*, PyObject* args) {
  PyObject* given[3];
  if (!PyArg_ParseTuple(args, "OOO:alike", &given[0], &given[1], &given[2])) return nullptr;
  const Torch& torch = torch_types();
  TableRow tables[3];
  for (int i = 0; i < 3; ++i) {
    if (torch.exchange == nullptr || !look(torch, given[i], &tables[i])) Py_RETURN_FALSE;
    if (tables[i].numel != tables[0].numel) Py_RETURN_FALSE;
  }
  const auto rows = [&](int i) { return static_cast<const TableRow*>(tables[i].data); };
  for (int64_t i = 0; i < tables[0].numel / kRowWords; ++i) {
    const TableRow &param = rows(0)[i], &grad = rows(1)[i], &then = rows(2)[i];
    for (const TableRow* other : {&grad, &then}) {
      if (other->numel != param.numel || other->code != param.code ||
          other->device_type != param.device_type || other->device_index != param.device_index)
        Py_RETURN_FALSE;
    }
    if (grad.dim != param.dim ||
        std::memcmp(grad.sizes, param.sizes, param.dim * sizeof(int64_t)) != 0)
      Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// Of a tensor that `look` knows, on the CPU; any other stays as it is.
PyObject* ask_huge_pages(PyObject*, PyObject* args) {
  PyObject* tensor;
  long long bytes;
  if (!PyArg_ParseTuple(args, "OL:ask_huge_pages", &tensor, &bytes)) return nullptr;
  const Torch& torch = torch_types();
  TableRow row;
  const bool known = torch.exchange != nullptr && look(torch, tensor, &row);
  if (known && row.device_type == codes().cpu) want_huge_pages(row.data, bytes);
  Py_RETURN_NONE;
}

}  // namespace sfron
