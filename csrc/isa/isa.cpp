// The dispatch table: every ISA row of this build, best first, and the choice among them.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace slmops {

namespace scalar {
extern const KernelTable kernels;
}

#if defined(__x86_64__)

namespace avx2 {
extern const KernelTable kernels;
}
namespace avx512_vnni {
extern const KernelTable kernels;
}

namespace {

constexpr uint32_t kAvx2Row = kAvx2 | kFma | kF16c;
constexpr uint32_t kAvx512VnniRow =
    kAvx2Row | kAvx512f | kAvx512bw | kAvx512vl | kAvx512dq | kAvx512vnni;

constexpr IsaRow kRows[] = {
    {"avx512_vnni", kAvx512VnniRow, &avx512_vnni::kernels},
    {"avx2", kAvx2Row, &avx2::kernels},
    {"scalar", 0, &scalar::kernels},
};

}  // namespace

uint32_t system_features() {
  __builtin_cpu_init();
  uint32_t found = 0;
  // The built-in takes literals only, and it also asks XCR0 whether the system saves the registers.
  if (__builtin_cpu_supports("avx2")) found |= kAvx2;
  if (__builtin_cpu_supports("fma")) found |= kFma;
  // Clang 14 does not know the name f16c; that the system saves its registers is AVX's to say.
  unsigned a, b, c, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  if (f16c && __builtin_cpu_supports("avx")) found |= kF16c;
  if (__builtin_cpu_supports("avx512f")) found |= kAvx512f;
  if (__builtin_cpu_supports("avx512bw")) found |= kAvx512bw;
  if (__builtin_cpu_supports("avx512vl")) found |= kAvx512vl;
  if (__builtin_cpu_supports("avx512dq")) found |= kAvx512dq;
  if (__builtin_cpu_supports("avx512vnni")) found |= kAvx512vnni;
  return found;
}

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

}  // namespace

#if defined(__linux__)

uint32_t system_features() {
  uint32_t found = 0;
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found |= kDot;
  if (getauxval(AT_HWCAP2) & HWCAP2_I8MM) found |= kI8mm;
  return found;
}

#elif defined(__APPLE__)

uint32_t system_features() {
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  return (has("hw.optional.arm.FEAT_DotProd") ? kDot : 0) |
         (has("hw.optional.arm.FEAT_I8MM") ? kI8mm : 0);
}

#else

uint32_t system_features() { return 0; }

#endif

#else

namespace {
constexpr IsaRow kRows[] = {{"scalar", 0, &scalar::kernels}};
}

uint32_t system_features() { return 0; }

#endif

namespace {

struct FeatureName {
  const char* name;
  uint32_t bit;
};

constexpr FeatureName kFeatureNames[] = {
    {"avx2", kAvx2},
    {"fma3", kFma},
    {"f16c", kF16c},
    {"avx512_f", kAvx512f},
    {"avx512_bw", kAvx512bw},
    {"avx512_vl", kAvx512vl},
    {"avx512_dq", kAvx512dq},
    {"avx512_vnni", kAvx512vnni},
    {"dot", kDot},
    {"i8mm", kI8mm},
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
  given_features.store(features, std::memory_order_release);
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
