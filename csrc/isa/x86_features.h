// What an x86-64 CPU and its operating system offer, asked without torch.
#pragma once
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "isa.h"

namespace slmops {

/// Asks the kernel to let this process, with all threads that it has or gets, use AMX's tile
/// registers; before, their use is a fault. False where it refuses or knows no tiles.
inline bool ask_for_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

/// `features` less those that the kernel does not let this process use.
inline uint32_t permitted(uint32_t features) {
  constexpr uint32_t kTiles = kAmxTile | kAmxInt8;
  const bool asked = (features & kTiles) == kTiles;
  return asked && ask_for_tiles() ? features : features & ~(kTiles | kAmxBf16);
}

inline uint32_t x86_features() {
  __builtin_cpu_init();
  uint32_t found = 0;
  // The built-in takes literals only, and it also asks XCR0 whether the system saves the registers.
  if (__builtin_cpu_supports("avx2")) found |= kAvx2;
  if (__builtin_cpu_supports("fma")) found |= kFma;
  if (__builtin_cpu_supports("avx512f")) found |= kAvx512f;
  if (__builtin_cpu_supports("avx512bw")) found |= kAvx512bw;
  if (__builtin_cpu_supports("avx512vl")) found |= kAvx512vl;
  if (__builtin_cpu_supports("avx512dq")) found |= kAvx512dq;
  if (__builtin_cpu_supports("avx512vnni")) found |= kAvx512vnni;
  // Clang 14 does not know the names of the others. That the system saves their registers is AVX's
  // to say, of tiles the kernel's.
  unsigned a, b, c, d;
  const bool avx = __builtin_cpu_supports("avx");
  if (__get_cpuid(1, &a, &b, &c, &d) != 0 && avx && (c & bit_F16C) != 0) found |= kF16c;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && avx) {
    if ((a & 1u << 4) != 0) found |= kAvxVnni;
    if ((a & 1u << 5) != 0 && (found & kAvx512f) != 0) found |= kAvx512bf16;
  }
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) != 0) {
    if ((d & 1u << 24) != 0) found |= kAmxTile;
    if ((d & 1u << 25) != 0) found |= kAmxInt8;
    if ((d & 1u << 22) != 0) found |= kAmxBf16;
  }
  return permitted(found);
}

}  // namespace slmops
