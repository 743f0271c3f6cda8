// The extension module, and the ops without tensors that show and choose the ISA row.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../isa/isa.h"
#include "text.h"

namespace slmops {
namespace {

/// Bits of comma-separated feature names. Those that no row asks for are passed over: a CPU has
/// many.
uint32_t parse_features(const std::string& names) {
  uint32_t bits = 0;
  for (size_t end = 0, begin; (begin = names.find_first_not_of(", ", end)) != names.npos;) {
    end = std::min(names.find_first_of(", ", begin), names.size());
    bits |= feature_bit(names.substr(begin, end - begin).c_str());
  }
  return bits;
}

std::runtime_error bad_name(const char* op, uint32_t features, const std::string& name) {
  return std::runtime_error(std::string(op) + ": expected one of " + runnable(features) +
                            " (the rows that can run), got '" + name + "'");
}

std::string isa() { return current().name; }

std::string isas() { return runnable(features()); }

std::string isa_rows() { return runnable(~0u); }

std::string isa_requires(Text row_name) {
  const std::string name = row_name.take();
  int count;
  const IsaRow* row = rows(&count);
  const IsaRow* end = row + count;
  row = std::find_if(row, end, [&](const IsaRow& r) { return name == r.name; });
  if (row == end) throw bad_name("isa_requires", ~0u, name);
  return feature_names(row->requires_features);
}

std::string isa_features(bool of_system) {
  return feature_names(of_system ? system_features() : features());
}

void set_features_by_name(Text names) { set_features(parse_features(names.take())); }

void set_isa_by_name(Text row_name) {
  const std::string name = row_name.take();
  if (!set_isa(name.c_str())) throw bad_name("set_isa", features(), name);
}

std::string select_by_name(Text feature_list, Text row_cap) {
  const uint32_t bits = parse_features(feature_list.take());
  const std::string cap = row_cap.take();
  const IsaRow* row = select(bits, cap.empty() ? nullptr : cap.c_str());
  if (row == nullptr) throw bad_name("select", bits, cap);
  return row->name;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def("_isa() -> str");
  m.def("_isas() -> str");
  m.def("_isa_rows() -> str");
  m.def("_isa_requires(str row) -> str");
  m.def("_isa_features(bool of_system) -> str");
  m.def("_set_features(str names) -> ()");
  m.def("_set_isa(str name) -> ()");
  m.def("_select(str features, str cap) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&isa));
  m.impl("_isas", TORCH_BOX(&isas));
  m.impl("_isa_rows", TORCH_BOX(&isa_rows));
  m.impl("_isa_requires", TORCH_BOX(&isa_requires));
  m.impl("_isa_features", TORCH_BOX(&isa_features));
  m.impl("_set_features", TORCH_BOX(&set_features_by_name));
  m.impl("_set_isa", TORCH_BOX(&set_isa_by_name));
  m.impl("_select", TORCH_BOX(&select_by_name));
}

}  // namespace slmops

// Nothing but Python calls PyInit__C; a program without Python, where none of this exists, loads
// the library for its ops.
#if defined(__GNUC__)
#pragma weak PyModule_Create2
#pragma weak PyArg_UnpackTuple
#pragma weak PyBool_FromLong
#pragma weak PyDict_Contains
#pragma weak PyDict_Next
#pragma weak PyErr_SetString
#pragma weak PyExc_TypeError
#pragma weak PyList_GetItem
#pragma weak PyList_Size
#pragma weak PyType_GetFlags
#endif

namespace {

// Between two looks at a model its weights pass through the cache, and what is looked at is not in
// there any more: asked for some objects ahead, it comes while others are looked at.
constexpr Py_ssize_t kAhead = 16;

void ask_for(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  static_cast<void>(p);
#endif
}

/// Sets a TypeError; returns what for_dicts does then.
int refuse(const char* what_was_expected) {
  PyErr_SetString(PyExc_TypeError, what_was_expected);
  return -1;
}

/// Calls body(dict) for the dicts of a list until it is false. Returns that, or -1 with an
/// exception set if the list is none of dicts.
template <class Body>
int for_dicts(PyObject* list, const Body& body) {
  if (!PyList_Check(list)) return refuse("expected a list of dicts");
  const Py_ssize_t count = PyList_Size(list);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (i + kAhead < count) ask_for(PyList_GetItem(list, i + kAhead));
    PyObject* dict = PyList_GetItem(list, i);
    if (!PyDict_Check(dict)) return refuse("expected a list of dicts");
    const int go_on = body(dict);
    if (go_on != 1) return go_on;
  }
  return 1;
}

PyObject* truth(int found) { return found < 0 ? nullptr : PyBool_FromLong(found); }

PyObject* values_are(PyObject* /*module*/, PyObject* arguments) {
  PyObject *dicts, *objects;
  if (!PyArg_UnpackTuple(arguments, "values_are", 2, 2, &dicts, &objects)) return nullptr;
  if (!PyList_Check(objects)) return truth(refuse("expected a list of objects"));
  const Py_ssize_t count = PyList_Size(objects);
  Py_ssize_t seen = 0;
  const int same = for_dicts(dicts, [&](PyObject* dict) {
    Py_ssize_t position = 0;
    PyObject* value;
    while (PyDict_Next(dict, &position, nullptr, &value)) {
      if (seen == count || PyList_GetItem(objects, seen++) != value) return 0;
    }
    return 1;
  });
  return truth(same == 1 ? seen == count : same);
}

PyObject* lack(PyObject* /*module*/, PyObject* arguments) {
  PyObject *dicts, *key;
  if (!PyArg_UnpackTuple(arguments, "lack", 2, 2, &dicts, &key)) return nullptr;
  return truth(for_dicts(dicts, [&](PyObject* dict) {
    const int there = PyDict_Contains(dict, key);
    return there < 0 ? -1 : 1 - there;
  }));
}

PyMethodDef methods[] = {
    {"values_are", values_are, METH_VARARGS,
     "values_are(dicts, objects): whether the values of a list of dicts, those of one after those "
     "of another, are a list's objects."},
    {"lack", lack, METH_VARARGS, "lack(dicts, key): whether none of a list of dicts has the key."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {.m_base = PyModuleDef_HEAD_INIT,
                          .m_name = "_C",
                          .m_doc = "Loading this module registers torch.ops.slmops.",
                          .m_size = -1,
                          .m_methods = methods};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
