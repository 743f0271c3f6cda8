// Which kernels run: the table of ISA rows, best first, and the choice among them.
#pragma once
#include <string>

#include "../kernels/kernels.h"

namespace slmops {

/// CPU features that rows ask for, one bit each.
enum Feature : uint32_t {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kF16c = 1u << 2,
  kAvx512f = 1u << 3,
  kAvx512bw = 1u << 4,
  kAvx512vl = 1u << 5,
  kAvx512dq = 1u << 6,
  kAvx512vnni = 1u << 7,
  kAvxVnni = 1u << 8,
  kAmxTile = 1u << 9,
  kAmxInt8 = 1u << 10,
  kAvx512bf16 = 1u << 11,
  kAmxBf16 = 1u << 12,
  kDot = 1u << 16,
  kI8mm = 1u << 17,
  kBf16 = 1u << 18,
};

struct IsaRow {
  const char* name;
  uint32_t requires_features;
  const KernelTable* kernels;
  const FastKernels* fast = nullptr;  // for CPUs with kAvx512bf16
};

/// All rows of this build, best first; the last one is `scalar`.
const IsaRow* rows(int* count);

/// The best row whose requirements `features` meet, not above the row named `cap` (null: no cap).
/// Null if `cap` names no row or one that `features` cannot run.
const IsaRow* select(uint32_t features, const char* cap);

/// Bit of a feature's name ("avx2", "avx512_vnni", ... as torch.cpu.get_capabilities() spells
/// them), or 0.
uint32_t feature_bit(const char* name);

/// The names of those bits, comma-separated; the inverse of feature_bit.
std::string feature_names(uint32_t features);

/// Names of the rows that `features` can run, best first, comma-separated.
std::string runnable(uint32_t features);

/// What the operating system and CPU offer, asked without torch. Where a row needs the kernel's
/// permission, this asks for it.
uint32_t system_features();

/// The row in use. First call: select(features given by set_features or system_features(),
/// $SLMOPS_ISA); throws std::runtime_error, with the valid names, if that variable names no row or
/// one that cannot run.
const IsaRow& current();
/// Replaces the features (from cpuinfo, at import) by those of them that the kernel permits;
/// forgets the current row.
void set_features(uint32_t features);
uint32_t features();
/// Caps the row; false if it is unknown or cannot run here.
bool set_isa(const char* name);

/// The bf16 kernels beside `row`, null where it or the CPU has none.
inline const FastKernels* fast_kernels(const IsaRow& row) {
  return (features() & kAvx512bf16) != 0 ? row.fast : nullptr;
}
/// Whether the CPU multiplies bf16 faster than fp32.
inline bool has_bf16() { return (features() & (kAvx512bf16 | kAmxBf16 | kBf16)) != 0; }

inline const KernelTable& kernels() { return *current().kernels; }

}  // namespace slmops
