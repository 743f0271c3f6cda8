// The SIMD contract on NEON with the instructions of i8mm: USDOT, 4 products of an unsigned and a
// signed byte in each of 4 lanes, and USMMLA, 2 outputs x 8 k times 8 k x 2 rows.
#pragma once
#include "neon.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr int32_t kDot8Bias = 0;
constexpr int kExpandRows = 8;

using Bytes = Line;

/// acc + w * a quad; the instruction has its number as an immediate.
inline int32x4_t dot(int32x4_t acc, uint8x16_t w, Codes a, int quad) {
  switch (quad) {
    case 0:
      return vusdotq_laneq_s32(acc, w, a, 0);
    case 1:
      return vusdotq_laneq_s32(acc, w, a, 1);
    case 2:
      return vusdotq_laneq_s32(acc, w, a, 2);
    default:
      return vusdotq_laneq_s32(acc, w, a, 3);
  }
}
inline Dot4 dot4(Dot4 d, Line u, Codes a, int quad) {
  SLMOPS_QUARTERS(Dot4, dot(d.q[i], u.q[i], a, quad));
}
inline Bytes bytes(Line x) { return x; }
inline I32 dot8(I32 acc, Bytes u, Codes a, int quad) {
  SLMOPS_QUARTERS(I32, dot(acc.q[i], u.q[i], a, quad));
}

constexpr bool kPairs = true;
/// The sums of two rows: a q has those of 2 outputs, of both rows each.
struct Pairs {
  static void begin(I32& a, I32& b) {
    const I32 x = a, y = b;
    a = {{vzip1q_s32(x.q[0], y.q[0]), vzip2q_s32(x.q[0], y.q[0]), vzip1q_s32(x.q[1], y.q[1]),
          vzip2q_s32(x.q[1], y.q[1])}};
    b = {{vzip1q_s32(x.q[2], y.q[2]), vzip2q_s32(x.q[2], y.q[2]), vzip1q_s32(x.q[3], y.q[3]),
          vzip2q_s32(x.q[3], y.q[3])}};
  }
  static void end(I32& a, I32& b) {
    const I32 x = a, y = b;
    a = {{vuzp1q_s32(x.q[0], x.q[1]), vuzp1q_s32(x.q[2], x.q[3]), vuzp1q_s32(y.q[0], y.q[1]),
          vuzp1q_s32(y.q[2], y.q[3])}};
    b = {{vuzp2q_s32(x.q[0], x.q[1]), vuzp2q_s32(x.q[2], x.q[3]), vuzp2q_s32(y.q[0], y.q[1]),
          vuzp2q_s32(y.q[2], y.q[3])}};
  }
  /// 16 bytes for each 2 outputs.
  static void store_operands(uint8_t* p, Line low, Line high) {
    const auto store = [&](int i) __attribute__((always_inline)) {
      const uint32x4_t a = vreinterpretq_u32_u8(low.q[i]), b = vreinterpretq_u32_u8(high.q[i]);
      vst1q_u8(p + 32 * i, vreinterpretq_u8_u32(vzip1q_u32(a, b)));
      vst1q_u8(p + 32 * i + 16, vreinterpretq_u8_u32(vzip2q_u32(a, b)));
    };
    store(0);
    store(1);
    store(2);
    store(3);
  }
  static void add(I32& a, I32& b, const uint8_t* p, Codes x, Codes y, int half) {
    const int64x2_t first = vreinterpretq_s64_s8(x), second = vreinterpretq_s64_s8(y);
    const int8x16_t codes =
        vreinterpretq_s8_s64(half == 0 ? vzip1q_s64(first, second) : vzip2q_s64(first, second));
    const auto sum = [&](int32x4_t acc, int i) __attribute__((always_inline)) {
      return vusmmlaq_s32(acc, vld1q_u8(p + 16 * i), codes);
    };
    a = {{sum(a.q[0], 0), sum(a.q[1], 1), sum(a.q[2], 2), sum(a.q[3], 3)}};
    b = {{sum(b.q[0], 4), sum(b.q[1], 5), sum(b.q[2], 6), sum(b.q[3], 7)}};
  }
};

}  // namespace
}  // namespace slmops::SLMOPS_ISA

#undef SLMOPS_QUARTERS
