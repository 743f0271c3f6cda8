// The SIMD contract on NEON with SDOT: 4 products of signed bytes in each of 4 lanes.
#pragma once
#include "neon.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr int32_t kDot8Bias = 128;
constexpr int kExpandRows = 8;
constexpr bool kPairs = false;
struct Pairs;

/// Weights as signed bytes.
struct Bytes {
  int8x16_t q[4];
};

/// acc + w * a quad; the instruction has its number as an immediate.
inline int32x4_t dot(int32x4_t acc, int8x16_t w, Codes a, int quad) {
  switch (quad) {
    case 0:
      return vdotq_laneq_s32(acc, w, a, 0);
    case 1:
      return vdotq_laneq_s32(acc, w, a, 1);
    case 2:
      return vdotq_laneq_s32(acc, w, a, 2);
    default:
      return vdotq_laneq_s32(acc, w, a, 3);
  }
}
/// Codes of 4 bits are the same as signed bytes.
inline Dot4 dot4(Dot4 d, Line u, Codes a, int quad) {
  SLMOPS_QUARTERS(Dot4, dot(d.q[i], vreinterpretq_s8_u8(u.q[i]), a, quad));
}
inline Bytes bytes(Line x) {
  SLMOPS_QUARTERS(Bytes, vreinterpretq_s8_u8(veorq_u8(x.q[i], vdupq_n_u8(128))));
}
inline I32 dot8(I32 acc, Bytes u, Codes a, int quad) {
  SLMOPS_QUARTERS(I32, dot(acc.q[i], u.q[i], a, quad));
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA

#undef SLMOPS_QUARTERS
