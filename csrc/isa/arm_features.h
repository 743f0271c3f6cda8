// What an AArch64 CPU and its operating system offer, asked without torch.
#pragma once
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "isa.h"

namespace slmops {

#if defined(__linux__)

inline uint32_t arm_features() {
  uint32_t found = 0;
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found |= kDot;
  if (getauxval(AT_HWCAP2) & HWCAP2_I8MM) found |= kI8mm;
  if (getauxval(AT_HWCAP2) & HWCAP2_BF16) found |= kBf16;
  return found;
}

#elif defined(__APPLE__)

inline uint32_t arm_features() {
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  uint32_t found = 0;
  if (has("hw.optional.arm.FEAT_DotProd")) found |= kDot;
  if (has("hw.optional.arm.FEAT_I8MM")) found |= kI8mm;
  if (has("hw.optional.arm.FEAT_BF16")) found |= kBf16;
  return found;
}

#else

inline uint32_t arm_features() { return 0; }

#endif

}  // namespace slmops
