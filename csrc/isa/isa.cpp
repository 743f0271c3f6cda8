// The dispatch table: every ISA row of this build, best first, and the choice among them.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#if defined(__x86_64__) || defined(_M_X64)
#include "x86_features.h"
#elif defined(__aarch64__)
#include "arm_features.h"
#endif

namespace slmops {

namespace scalar {
extern const KernelTable kernels;
}

#if defined(__x86_64__) || defined(_M_X64)

namespace avx2 {
extern const KernelTable kernels;
}
namespace avx_vnni {
extern const KernelTable kernels;
}
namespace avx512_vnni {
extern const KernelTable kernels;
}
namespace amx {
extern const KernelTable kernels;
}
namespace avx512_bf16 {
extern const FastKernels kernels;
}

namespace {

constexpr uint32_t kAvx2Row = kAvx2 | kFma | kF16c;
constexpr uint32_t kAvx512VnniRow =
    kAvx2Row | kAvx512f | kAvx512bw | kAvx512vl | kAvx512dq | kAvx512vnni;
constexpr uint32_t kAmxRow = kAvx512VnniRow | kAmxTile | kAmxInt8;

constexpr IsaRow kRows[] = {
    {"amx", kAmxRow, &amx::kernels, &avx512_bf16::kernels},
    {"avx512_vnni", kAvx512VnniRow, &avx512_vnni::kernels, &avx512_bf16::kernels},
    {"avx_vnni", kAvx2Row | kAvxVnni, &avx_vnni::kernels},
    {"avx2", kAvx2Row, &avx2::kernels},
    {"scalar", 0, &scalar::kernels},
};

}  // namespace

uint32_t system_features() { return x86_features(); }

#elif defined(__aarch64__)

namespace neon_dotprod {
extern const KernelTable kernels;
}
namespace neon_i8mm {
extern const KernelTable kernels;
}

namespace {

constexpr IsaRow kRows[] = {
    {"neon_i8mm", kDot | kI8mm, &neon_i8mm::kernels},
    {"neon_dotprod", kDot, &neon_dotprod::kernels},
    {"scalar", 0, &scalar::kernels},
};

uint32_t permitted(uint32_t features) { return features; }

}  // namespace

uint32_t system_features() { return arm_features(); }

#else

namespace {
constexpr IsaRow kRows[] = {{"scalar", 0, &scalar::kernels}};
}

uint32_t system_features() { return 0; }

namespace {
uint32_t permitted(uint32_t features) { return features; }
}  // namespace

#endif

namespace {

struct FeatureName {
  const char* name;
  uint32_t bit;
};

constexpr FeatureName kFeatureNames[] = {
    {"avx2", kAvx2},          {"fma3", kFma},
    {"f16c", kF16c},          {"avx512_f", kAvx512f},
    {"avx512_bw", kAvx512bw}, {"avx512_vl", kAvx512vl},
    {"avx512_dq", kAvx512dq}, {"avx512_vnni", kAvx512vnni},
    {"avx_vnni", kAvxVnni},   {"amx_tile", kAmxTile},
    {"amx_int8", kAmxInt8},   {"avx512_bf16", kAvx512bf16},
    {"amx_bf16", kAmxBf16},   {"dot", kDot},
    {"i8mm", kI8mm},          {"bf16", kBf16},
};

constexpr uint32_t kNotGiven = 1u << 31;  // no feature has this bit

std::atomic<uint32_t> given_features{kNotGiven};
std::atomic<const IsaRow*> chosen{nullptr};

bool can_run(uint32_t features, const IsaRow& row) {
  return (features & row.requires_features) == row.requires_features;
}

void append(std::string* list, const char* name) {
  if (!list->empty()) *list += ", ";
  *list += name;
}

const IsaRow& first_choice() {
  const char* cap = std::getenv("SLMOPS_ISA");
  if (cap != nullptr && *cap == '\0') cap = nullptr;
  const uint32_t offered = features();
  const IsaRow* row = select(offered, cap);
  if (row == nullptr) {
    throw std::runtime_error("SLMOPS_ISA: expected one of " + runnable(offered) +
                             " (the rows that can run here) or nothing, got '" + cap + "'");
  }
  return *row;
}

}  // namespace

const IsaRow* rows(int* count) {
  *count = static_cast<int>(std::size(kRows));
  return kRows;
}

const IsaRow* select(uint32_t features, const char* cap) {
  for (const IsaRow& row : kRows) {
    if (cap != nullptr && std::strcmp(row.name, cap) != 0) continue;
    if (can_run(features, row)) return &row;
  }
  return nullptr;
}

uint32_t feature_bit(const char* name) {
  for (const FeatureName& feature : kFeatureNames) {
    if (std::strcmp(feature.name, name) == 0) return feature.bit;
  }
  return 0;
}

std::string feature_names(uint32_t features) {
  std::string list;
  for (const FeatureName& feature : kFeatureNames) {
    if (features & feature.bit) append(&list, feature.name);
  }
  return list;
}

std::string runnable(uint32_t features) {
  std::string list;
  for (const IsaRow& row : kRows) {
    if (can_run(features, row)) append(&list, row.name);
  }
  return list;
}

const IsaRow& current() {
  const IsaRow* row = chosen.load(std::memory_order_acquire);
  if (row != nullptr) [[likely]]
    return *row;
  row = &first_choice();
  chosen.store(row, std::memory_order_release);
  return *row;
}

void set_features(uint32_t features) {
  given_features.store(permitted(features), std::memory_order_release);
  chosen.store(nullptr, std::memory_order_release);
}

uint32_t features() {
  const uint32_t given = given_features.load(std::memory_order_acquire);
  return given == kNotGiven ? system_features() : given;
}

bool set_isa(const char* name) {
  const IsaRow* row = select(features(), name);
  if (row == nullptr) return false;
  chosen.store(row, std::memory_order_release);
  return true;
}

}  // namespace slmops
