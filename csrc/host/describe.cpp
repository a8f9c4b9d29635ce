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

// What `look` needs of items to come: of one its Python object, of a nearer one the tensor, of the
// next but one what that points to (storage, gradient, version). A wrong hint does no harm.
void prefetch_items(const Torch& torch, PyObject* list, Py_ssize_t i, Py_ssize_t size) {
  constexpr Py_ssize_t soon = kSoon;
  const auto words = [&](Py_ssize_t at) {
    PyObject* object = at < size ? PyList_GetItem(list, at) : nullptr;
    return torch.holds(object) ? words_of(object) : nullptr;
  };
  if (i + 2 * soon < size)
    prefetch_at(reinterpret_cast<uintptr_t>(PyList_GetItem(list, i + 2 * soon)), 1);
  if (const uintptr_t* tensor = words(i + soon))
    prefetch_at(reinterpret_cast<uintptr_t>(tensor), 3);
  if (const uintptr_t* tensor = words(i + soon / 2)) {
    for (int word = 2; word < 6; ++word) prefetch_at(tensor[word], 1);
  }
}

// Where the rows of lists go, one list after another.
struct Rows {
  TableRow* next;
  int64_t room;       // words
  bool plain = true;  // all are contiguous, and none of fp64, which no native kernel takes
};

// The rows of one list: of its tensors; or, if it is a tensor itself, those that were written to it
// before; or of several lists in a tuple. -1 for a list that cannot be described, else their count.
int64_t describe_list(const Torch& torch, PyObject* list, Rows& rows) {
  if (PyTuple_Check(list)) {
    int64_t total = 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(list); ++i) {
      const int64_t count = describe_list(torch, PyTuple_GetItem(list, i), rows);
      if (count < 0) return count;
      total += count;
    }
    return total;
  }
  TableRow table;
  const bool known = !PyList_Check(list);
  if (known && !look(torch, list, &table)) return -1;
  const int64_t count = known ? table.numel / kRowWords : PyList_Size(list);
  if ((rows.room -= count * kRowWords) < 0) {
    PyErr_SetString(PyExc_ValueError,
                    "table: expected a table with room for all lists, found a shorter one");
    return -1;
  }
  TableRow* const row = rows.next;
  rows.next += count;
  // what lies there already stays
  if (known && table.data != row) std::memcpy(row, table.data, count * sizeof(TableRow));
  const int32_t float64 = codes().float64;
  for (int64_t i = 0; i < count; ++i) {
    if (!known) {
      prefetch_items(torch, list, i, count);
      if (!look(torch, PyList_GetItem(list, i), row + i)) return -1;
    }
    rows.plain = rows.plain && row[i].contiguous && row[i].code != float64;
  }
  return count;
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
  Rows rows{reinterpret_cast<TableRow*>(counts + count), table.numel - count};
  for (Py_ssize_t l = 0; l < count; ++l) {
    // in a table too short for its counts the first list finds no room
    const int64_t size = describe_list(torch, PyTuple_GetItem(lists, l), rows);
    if (size < 0 && PyErr_Occurred() != nullptr) return nullptr;
    if (size < 0) return PyLong_FromLong(kByHandles);
    counts[l] = size;
  }
  return PyLong_FromLong(rows.plain ? kByTable : kByCopies);
}

namespace {

// Whether a gradient has shape, dtype and device of its parameter, and that one the size, dtype and
// device that it had once.
bool alike(const TableRow& param, const TableRow& grad, const TableRow& then) {
  for (const TableRow* other : {&grad, &then}) {
    if (other->numel != param.numel || other->code != param.code ||
        other->device_type != param.device_type || other->device_index != param.device_index)
      return false;
  }
  return grad.dim == param.dim &&
         std::memcmp(grad.sizes, param.sizes, param.dim * sizeof(int64_t)) == 0;
}

// What `tensor.grad` calls.
PyObject* gradient_of(const Torch& torch, PyObject* tensor) {
  static PyObject* const member = PyObject_GetAttrString(torch.tensor, "grad");
  static const auto get =
      reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(member), Py_tp_descr_get));
  return get(member, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
}

}  // namespace

// The gradients, and the rows of both. Of a step that is like the one before also the parameters
// that it had, and their rows.
PyObject* gather(PyObject*, PyObject* args) {
  PyObject *params, *targets[3], *before = nullptr;
  targets[2] = nullptr;
  if (!PyArg_ParseTuple(args, "O!OO|O!O:gather", &PyList_Type, &params, &targets[0], &targets[1],
                        &PyList_Type, &before, &targets[2]))
    return nullptr;
  const Torch& torch = torch_types();
  const Py_ssize_t size = PyList_Size(params);
  if (before != nullptr && PyList_Size(before) != size) Py_RETURN_NONE;
  TableRow tables[3];
  for (int i = 0; i < 3 && targets[i] != nullptr; ++i) {
    if (torch.exchange == nullptr || !look(torch, targets[i], &tables[i])) Py_RETURN_NONE;
    if (tables[i].numel < size * kRowWords) {
      PyErr_SetString(PyExc_ValueError,
                      "table: expected tables with room for all parameters, found shorter ones");
      return nullptr;
    }
  }
  TableRow* const of_param = static_cast<TableRow*>(tables[0].data);
  TableRow* const of_grad = static_cast<TableRow*>(tables[1].data);
  const TableRow* const then =
      targets[2] == nullptr ? nullptr : static_cast<TableRow*>(tables[2].data);
  PyObject* grads = PyList_New(size);
  bool usable = grads != nullptr;
  for (Py_ssize_t i = 0; usable && i < size; ++i) {
    prefetch_items(torch, params, i, size);
    // where the gradient was in an earlier step
    if (i + static_cast<Py_ssize_t>(kSoon) < size)
      prefetch_at(reinterpret_cast<uintptr_t>(of_grad[i + kSoon].sizes) - 64, 3);
    // null: a mode that saw the look-up before this has shortened the list
    PyObject* param = PyList_GetItem(params, i);
    const bool known = param != nullptr &&
                       (before == nullptr || PyList_GetItem(before, i) == param) &&
                       look(torch, param, of_param + i);
    PyObject* grad = known ? gradient_of(torch, param) : nullptr;
    if (grad != nullptr) PyList_SetItem(grads, i, grad);
    usable = grad != nullptr && of_param[i].contiguous;
  }
  for (Py_ssize_t i = 0; usable && i < size; ++i) {
    prefetch_items(torch, grads, i, size);
    usable = look(torch, PyList_GetItem(grads, i), of_grad + i) && of_grad[i].contiguous &&
             (then == nullptr || alike(of_param[i], of_grad[i], then[i]));
  }
  if (usable && PyErr_Occurred() == nullptr) return grads;
  Py_XDECREF(grads);
  if (PyErr_Occurred() != nullptr) return nullptr;
  Py_RETURN_NONE;
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
