// The SIMD contract on NEON with the instructions of i8mm: USDOT, 4 products of an unsigned and a
// signed byte in each of 4 lanes, and USMMLA, 2 outputs x 8 k times 8 k x 2 rows.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace slmops::SLMOPS_ISA {
namespace {

#define SLMOPS_LANE_DOT vusdotq_laneq_s32
constexpr int32_t kDot8Bias = 0;
using Weights = uint8x16_t;
inline Weights as_weights(uint8x16_t u) { return u; }
inline Weights byte_weights(uint8x16_t u) { return u; }

}  // namespace
}  // namespace slmops::SLMOPS_ISA

#include "neon.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr bool kBlocks = true;
/// Two q are a pair of rows: outputs 0 and 1, both rows of each, then outputs 2 and 3.
struct Block : BlockWords {
  static constexpr int kFactors = 8;

  static void spread(void* out, int pair, uint32_t a, uint32_t b) {
    const uint64x2_t both = vdupq_n_u64(a | static_cast<uint64_t>(b) << 32);
    uint64_t* p = static_cast<uint64_t*>(out) + 4 * pair;
    vst1q_u64(p, both);
    vst1q_u64(p + 2, both);
  }
  template <class Four>
  static void spread(void* out, int pair, Four a, Four b) {
    const uint32x4_t x = bits(a), y = bits(b);
    const uint64x2_t low = vreinterpretq_u64_u32(vzip1q_u32(x, y)),
                     high = vreinterpretq_u64_u32(vzip2q_u32(x, y));
    const uint64x2_t both[4] = {vdupq_laneq_u64(low, 0), vdupq_laneq_u64(low, 1),
                                vdupq_laneq_u64(high, 0), vdupq_laneq_u64(high, 1)};
    uint64_t* p = static_cast<uint64_t*>(out) + 4 * pair;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, p += 16) {
      vst1q_u64(p, both[i]);
      vst1q_u64(p + 2, both[i]);
    }
  }
  /// Quads 0 and 2 of each row, then 1 and 3.
  static void store_codes(int8_t* out, int row, Codes x) {
    const int32x4_t quads = vreinterpretq_s32_s8(x);
    vst1_s8(out + 8 * row, vget_low_s8(vreinterpretq_s8_s32(vuzp1q_s32(quads, quads))));
    vst1_s8(out + 64 + 8 * row, vget_low_s8(vreinterpretq_s8_s32(vuzp2q_s32(quads, quads))));
  }
  static void store_factors(float* out, F32 s) {
    for (int i = 0; i < 4; ++i) {
      vst1q_f32(out + 8 * i, vzip1q_f32(s.q[i], s.q[i]));
      vst1q_f32(out + 8 * i + 4, vzip2q_f32(s.q[i], s.q[i]));
    }
  }
  static F32 load_factors(const float* p) {
    const float32x4_t a = vld1q_f32(p), b = vld1q_f32(p + 4);
    return {{a, b, a, b}};
  }
  static F32 load_sums(const float* p, int64_t stride) {
    const float32x4_t a = vld1q_f32(p), b = vld1q_f32(p + stride), c = vld1q_f32(p + 2 * stride),
                      d = vld1q_f32(p + 3 * stride);
    return {{vzip1q_f32(a, b), vzip2q_f32(a, b), vzip1q_f32(c, d), vzip2q_f32(c, d)}};
  }
  static void store_sums(float* p, int64_t stride, F32 x) {
    vst1q_f32(p, vuzp1q_f32(x.q[0], x.q[1]));
    vst1q_f32(p + stride, vuzp2q_f32(x.q[0], x.q[1]));
    vst1q_f32(p + 2 * stride, vuzp1q_f32(x.q[2], x.q[3]));
    vst1q_f32(p + 3 * stride, vuzp2q_f32(x.q[2], x.q[3]));
  }

  /// Lanes of two lines of the same outputs: 8 bytes of each of 2 outputs.
  struct Zipped {
    uint8x16_t a, b;
  };
  static Zipped zip(uint8x16_t x, uint8x16_t y) {
    const uint32x4_t first = vreinterpretq_u32_u8(x), second = vreinterpretq_u32_u8(y);
    return {vreinterpretq_u8_u32(vzip1q_u32(first, second)),
            vreinterpretq_u8_u32(vzip2q_u32(first, second))};
  }
  static void store_int4(uint8_t* out, Line first, Line second) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, out += 64) {
      const Zipped z = zip(first.q[i], second.q[i]);
      const Line operands = {{vandq_u8(z.a, vdupq_n_u8(15)), vandq_u8(z.b, vdupq_n_u8(15)),
                              vshrq_n_u8(z.a, 4), vshrq_n_u8(z.b, 4)}};
      store_line(out, operands);
    }
  }
  static void store_int8(uint8_t* out, const Line (&line)[4]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, out += 64) {
      const Zipped even = zip(line[0].q[i], line[2].q[i]), odd = zip(line[1].q[i], line[3].q[i]);
      const Line operands = {{even.a, even.b, odd.a, odd.b}};
      store_line(out, operands);
    }
  }
  static void store_sub16(uint8_t* out, Line first, Line second, const uint8_t* sub_scales, int j) {
    const uint8x16_t places[2] = {{0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2},
                                  {4, 4, 4, 4, 4, 4, 4, 4, 6, 6, 6, 6, 6, 6, 6, 6}};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, out += 64) {
      const uint8x16_t pairs = vld1q_u8(sub_scales + 16 * (i / 2));
      const uint8x16_t place = vdupq_n_u8(static_cast<uint8_t>(8 * (i % 2) + j / 2));
      const Zipped z = zip(first.q[i], second.q[i]);
      const uint8x16_t both[2] = {z.a, z.b};
      for (int h = 0; h < 2; ++h) {
        const uint8x16_t byte = vqtbl1q_u8(pairs, vaddq_u8(places[h], place));
        const uint8x16_t sub = j % 2 == 0 ? vandq_u8(byte, vdupq_n_u8(15)) : vshrq_n_u8(byte, 4);
        // u * sub + (128 - 8 * sub)
        const uint8x16_t shift = vmlsq_u8(vdupq_n_u8(128), sub, vdupq_n_u8(8));
        vst1q_u8(out + 16 * h, vmlaq_u8(shift, vandq_u8(both[h], vdupq_n_u8(15)), sub));
        vst1q_u8(out + 16 * h + 32, vmlaq_u8(shift, vshrq_n_u8(both[h], 4), sub));
      }
    }
  }

  static void add(I32 (&sum)[2], const uint8_t* operands, const int8_t* codes) {
    I32 x = sum[0], y = sum[1];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i, operands += 32, codes += 64) {
      const uint8x16_t v = vld1q_u8(operands), w = vld1q_u8(operands + 16);
      const auto two_pairs = [&](I32& s, const int8_t* p) __attribute__((always_inline)) {
        const int8x16_t a = vld1q_s8(p), b = vld1q_s8(p + 16);
        s = {{vusmmlaq_s32(s.q[0], v, a), vusmmlaq_s32(s.q[1], w, a), vusmmlaq_s32(s.q[2], v, b),
              vusmmlaq_s32(s.q[3], w, b)}};
      };
      two_pairs(x, codes);
      two_pairs(y, codes + 32);
    }
    sum[0] = x;
    sum[1] = y;
  }
};

}  // namespace
}  // namespace slmops::SLMOPS_ISA
