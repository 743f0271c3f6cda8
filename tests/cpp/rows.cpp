// The list of rows under test.
#include "testing.h"

namespace slmops {

#if defined(__x86_64__)
namespace avx512_emulated {
extern const KernelTable kernels;
}
namespace amx_emulated {
extern const KernelTable kernels;
}
namespace avx_vnni_emulated {
extern const KernelTable kernels;
}
namespace avx_vnni_reencoded {
extern const KernelTable kernels;
}
#endif

namespace testing {

const IsaRow& scalar_row() {
  int count = 0;
  const IsaRow* all = rows(&count);
  EXPECT(std::string(all[count - 1].name) == "scalar", "got %s", all[count - 1].name);
  return all[count - 1];
}

namespace {
const IsaRow* chosen_row = nullptr;
}

void choose_row(const char* name) {
  chosen_row = select(~0u, name);
  EXPECT(chosen_row != nullptr, "one of %s, got %s", runnable(~0u).c_str(), name);
}

const std::vector<IsaRow>& other_rows() {
  static const std::vector<IsaRow> found = [] {
    std::vector<IsaRow> list;
    if (chosen_row != nullptr) return std::vector<IsaRow>{*chosen_row};
    int count = 0;
    const IsaRow* all = rows(&count);
    const uint32_t offered = system_features();
    for (int i = 0; i + 1 < count; ++i) {
      if ((offered & all[i].requires_features) == all[i].requires_features) list.push_back(all[i]);
    }
#if defined(__x86_64__)
    constexpr uint32_t kVnni = kAvx512vl | kAvx512vnni;
    const IsaRow more[] = {
        {"avx_vnni, emulated", kAvx2 | kFma | kF16c, &avx_vnni_emulated::kernels},
        {"avx_vnni, re-encoded", kAvx2 | kFma | kF16c | kVnni, &avx_vnni_reencoded::kernels}};
    for (const IsaRow& row : more) {
      if ((offered & row.requires_features) == row.requires_features) list.push_back(row);
    }
    list.push_back({"avx512_vnni, emulated", 0, &avx512_emulated::kernels});
#endif
    return list;
  }();
  return found;
}

const std::vector<IsaRow>& linear_rows() {
  static const std::vector<IsaRow> found = [] {
    std::vector<IsaRow> list = other_rows();
#if defined(__x86_64__)
    if (chosen_row == nullptr) list.push_back({"amx, emulated", 0, &amx_emulated::kernels});
#endif
    return list;
  }();
  return found;
}

}  // namespace testing
}  // namespace slmops
