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

// Nothing but Python calls PyInit__C; a program without Python, where this does not exist, loads
// the library for its ops.
#if defined(__GNUC__)
#pragma weak PyModule_Create2
#endif

namespace {
PyModuleDef definition = {.m_base = PyModuleDef_HEAD_INIT,
                          .m_name = "_C",
                          .m_doc = "Loading this module registers torch.ops.slmops.",
                          .m_size = -1};
}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
