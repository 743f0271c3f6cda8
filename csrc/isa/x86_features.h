// What an x86-64 CPU and its operating system offer, asked without torch.
#pragma once
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstring>

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

struct CpuidAnswer {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

/// What CPUID says to leaf and subleaf; zeros where it has no such leaf.
inline CpuidAnswer cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidAnswer answer;
#if defined(_MSC_VER) && !defined(__clang__)
  int words[4];
  __cpuid(words, 0);
  if (leaf > static_cast<uint32_t>(words[0])) return answer;
  __cpuidex(words, static_cast<int>(leaf), static_cast<int>(subleaf));
  memcpy(&answer, words, sizeof(answer));
#else
  __get_cpuid_count(leaf, subleaf, &answer.a, &answer.b, &answer.c, &answer.d);
#endif
  return answer;
}

/// XCR0: which registers the system saves. To be asked only where CPUID has OSXSAVE.
inline uint64_t saved_registers() {
#if defined(_MSC_VER) && !defined(__clang__)
  return _xgetbv(0);
#else
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
#endif
}

inline uint32_t x86_features() {
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6;  // with all that they contain
  const CpuidAnswer one = cpuid(1, 0), seven = cpuid(7, 0), more = cpuid(7, 1);
  const uint64_t saved = one.c >> 27 & 1 ? saved_registers() : 0;
  const bool ymm = (saved & kYmm) == kYmm, zmm = (saved & kZmm) == kZmm;
  uint32_t found = 0;
  const auto add = [&](bool usable, uint32_t word, int bit, uint32_t feature) {
    if (usable && (word >> bit & 1) != 0) found |= feature;
  };
  add(ymm, one.c, 12, kFma);
  add(ymm, one.c, 29, kF16c);
  add(ymm, seven.b, 5, kAvx2);
  add(ymm, more.a, 4, kAvxVnni);
  add(zmm, more.a, 5, kAvx512bf16);
  add(zmm, seven.b, 16, kAvx512f);
  add(zmm, seven.b, 17, kAvx512dq);
  add(zmm, seven.b, 30, kAvx512bw);
  add(zmm, seven.b, 31, kAvx512vl);
  add(zmm, seven.c, 11, kAvx512vnni);
  // Whether the tiles are saved is the kernel's to say.
  add(true, seven.d, 22, kAmxBf16);
  add(true, seven.d, 24, kAmxTile);
  add(true, seven.d, 25, kAmxInt8);
  return permitted(found);
}

}  // namespace slmops
