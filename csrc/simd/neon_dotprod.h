// The SIMD contract on NEON with SDOT: 4 products of signed bytes in each of 4 lanes.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace slmops::SLMOPS_ISA {
namespace {

#define SLMOPS_LANE_DOT vdotq_laneq_s32
constexpr int32_t kDot8Bias = 128;
using Weights = int8x16_t;
/// Codes of 4 bits are the same as signed bytes.
inline Weights as_weights(uint8x16_t u) { return vreinterpretq_s8_u8(u); }
inline Weights byte_weights(uint8x16_t u) {
  return vreinterpretq_s8_u8(veorq_u8(u, vdupq_n_u8(128)));
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA

#include "neon.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr bool kBlocks = true;
/// A q is a row, its lanes are the outputs.
struct Block : BlockWords {
  static constexpr int kFactors = 4;

  static void spread(void* out, int pair, uint32_t a, uint32_t b) {
    uint32_t* p = static_cast<uint32_t*>(out) + 8 * pair;
    vst1q_u32(p, vdupq_n_u32(a));
    vst1q_u32(p + 4, vdupq_n_u32(b));
  }
  template <class Four>
  static void spread(void* out, int pair, Four a, Four b) {
    const uint32x4_t x = bits(a), y = bits(b);
    const uint32x4_t xs[4] = {vdupq_laneq_u32(x, 0), vdupq_laneq_u32(x, 1), vdupq_laneq_u32(x, 2),
                              vdupq_laneq_u32(x, 3)};
    const uint32x4_t ys[4] = {vdupq_laneq_u32(y, 0), vdupq_laneq_u32(y, 1), vdupq_laneq_u32(y, 2),
                              vdupq_laneq_u32(y, 3)};
    uint32_t* p = static_cast<uint32_t*>(out) + 8 * pair;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, p += 32) {
      vst1q_u32(p, xs[i]);
      vst1q_u32(p + 4, ys[i]);
    }
  }
  static void store_codes(int8_t* out, int row, Codes x) { vst1q_s8(out + 16 * row, x); }
  static void store_factors(float* out, F32 s) { store(out, s); }
  static F32 load_factors(const float* p) {
    const float32x4_t s = vld1q_f32(p);
    return {{s, s, s, s}};
  }
  static F32 load_sums(const float* p, int64_t stride) {
    return {{vld1q_f32(p), vld1q_f32(p + stride), vld1q_f32(p + 2 * stride),
             vld1q_f32(p + 3 * stride)}};
  }
  static void store_sums(float* p, int64_t stride, F32 x) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + i * stride, x.q[i]);
  }

  static void store_int4(uint8_t* out, Line first, Line second) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, out += 64) {
      const Line operands = {{vandq_u8(first.q[i], vdupq_n_u8(15)), vshrq_n_u8(first.q[i], 4),
                              vandq_u8(second.q[i], vdupq_n_u8(15)), vshrq_n_u8(second.q[i], 4)}};
      store_line(out, operands);
    }
  }
  static void store_int8(uint8_t* out, const Line (&line)[4]) {
    const uint8x16_t high = vdupq_n_u8(128);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, out += 64) {
      const Line operands = {{veorq_u8(line[0].q[i], high), veorq_u8(line[1].q[i], high),
                              veorq_u8(line[2].q[i], high), veorq_u8(line[3].q[i], high)}};
      store_line(out, operands);
    }
  }
  static void store_sub16(uint8_t* out, Line first, Line second, const uint8_t* sub_scales, int j) {
    const uint8x16_t places = {0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6};
    const auto scaled = [](uint8x16_t u, uint8x16_t sub) __attribute__((always_inline)) {
      return vmulq_u8(vsubq_u8(u, vdupq_n_u8(8)), sub);
    };
    for (int i = 0; i < 4; ++i, out += 64) {
      const uint8_t place = static_cast<uint8_t>(8 * (i % 2) + j / 2);
      const uint8x16_t pairs =
          vqtbl1q_u8(vld1q_u8(sub_scales + 16 * (i / 2)), vaddq_u8(places, vdupq_n_u8(place)));
      const uint8x16_t sub = j % 2 == 0 ? vandq_u8(pairs, vdupq_n_u8(15)) : vshrq_n_u8(pairs, 4);
      vst1q_u8(out, scaled(vandq_u8(first.q[i], vdupq_n_u8(15)), sub));
      vst1q_u8(out + 16, scaled(vshrq_n_u8(first.q[i], 4), sub));
      vst1q_u8(out + 32, scaled(vandq_u8(second.q[i], vdupq_n_u8(15)), sub));
      vst1q_u8(out + 48, scaled(vshrq_n_u8(second.q[i], 4), sub));
    }
  }

  static void add(I32 (&sum)[2], const uint8_t* operands, const int8_t* codes) {
    const int8x16_t w[4] = {load_codes(reinterpret_cast<const int8_t*>(operands)),
                            load_codes(reinterpret_cast<const int8_t*>(operands) + 16),
                            load_codes(reinterpret_cast<const int8_t*>(operands) + 32),
                            load_codes(reinterpret_cast<const int8_t*>(operands) + 48)};
    const auto row = [&](int32x4_t acc, int r) __attribute__((always_inline)) {
      const Codes a = load_codes(codes + 16 * r);
      return dot(dot(dot(dot(acc, w[0], a, 0), w[1], a, 1), w[2], a, 2), w[3], a, 3);
    };
    const I32 x = sum[0], y = sum[1];
    sum[0] = {{row(x.q[0], 0), row(x.q[1], 1), row(x.q[2], 2), row(x.q[3], 3)}};
    sum[1] = {{row(y.q[0], 4), row(y.q[1], 5), row(y.q[2], 6), row(y.q[3], 7)}};
  }
};

}  // namespace
}  // namespace slmops::SLMOPS_ISA
