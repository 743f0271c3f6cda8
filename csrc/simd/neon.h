// The SIMD contract on NEON: a vector is four q registers. scalar.h documents the functions.
//
// A row's header has defined before what its dot product is: SLMOPS_LANE_DOT, the type Weights of
// its first factor, as_weights of nibbles and byte_weights of bytes, kDot8Bias. It has the blocks
// of rows after it.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "compiler.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr int kLanes = 16;
// Up to 4 rows of a half of a tile, or 1 of a whole one: 16 or 8 int32 sums of 32 q. More rows go
// in blocks of 8 rows x 4 outputs.
constexpr int kMaxRows = 4;
constexpr int kWideRows = 1;
constexpr bool kDotsByRows = true;
constexpr int kSubBlockRows = 0;
constexpr int kStreamRows = 1;
constexpr int kLongSums = 1;
constexpr int kExpandRows = 0;
constexpr int kFloatSums = 4;

inline void prefetch(const uint8_t* p) { SLMOPS_PREFETCH(p); }
inline void prefetch_l2(const uint8_t* p) { SLMOPS_PREFETCH_L2(p); }

struct F32 {
  float32x4_t q[4];
};
struct I32 {
  int32x4_t q[4];
};
struct Mask {
  uint32x4_t q[4];
};
struct Line {
  uint8x16_t q[4];
};
/// A Line as bytes that the dot product takes.
struct Bytes {
  Weights q[4];
};
using Dot4 = I32;
/// A quad is a lane, which the dot instructions take for all outputs.
using Codes = int8x16_t;

// A function's result, quarter i from `expr`.
#define SLMOPS_QUARTERS(Type, expr)                                            \
  const auto one = [&](int i) __attribute__((always_inline)) { return expr; }; \
  return Type {                                                                \
    {                                                                          \
      one(0), one(1), one(2), one(3)                                           \
    }                                                                          \
  }

// --- fp32 ---
inline F32 splat(float x) { SLMOPS_QUARTERS(F32, (void(i), vdupq_n_f32(x))); }
inline F32 load(const float* p) { SLMOPS_QUARTERS(F32, vld1q_f32(p + 4 * i)); }
inline void store(float* p, F32 x) {
  vst1q_f32(p, x.q[0]);
  vst1q_f32(p + 4, x.q[1]);
  vst1q_f32(p + 8, x.q[2]);
  vst1q_f32(p + 12, x.q[3]);
}
inline F32 operator+(F32 x, F32 y) { SLMOPS_QUARTERS(F32, vaddq_f32(x.q[i], y.q[i])); }
inline F32 operator-(F32 x, F32 y) { SLMOPS_QUARTERS(F32, vsubq_f32(x.q[i], y.q[i])); }
inline F32 operator*(F32 x, F32 y) { SLMOPS_QUARTERS(F32, vmulq_f32(x.q[i], y.q[i])); }
inline F32 operator/(F32 x, F32 y) { SLMOPS_QUARTERS(F32, vdivq_f32(x.q[i], y.q[i])); }
inline F32 fma(F32 x, F32 y, F32 z) { SLMOPS_QUARTERS(F32, vfmaq_f32(z.q[i], x.q[i], y.q[i])); }
inline F32 fnma(F32 x, F32 y, F32 z) { SLMOPS_QUARTERS(F32, vfmsq_f32(z.q[i], x.q[i], y.q[i])); }
/// Of a NaN and a number these give the number.
inline F32 min(F32 x, F32 y) { SLMOPS_QUARTERS(F32, vminnmq_f32(x.q[i], y.q[i])); }
inline F32 max(F32 x, F32 y) { SLMOPS_QUARTERS(F32, vmaxnmq_f32(x.q[i], y.q[i])); }
inline Mask operator<(F32 x, F32 y) { SLMOPS_QUARTERS(Mask, vcltq_f32(x.q[i], y.q[i])); }
inline F32 select(Mask m, F32 x, F32 y) { SLMOPS_QUARTERS(F32, vbslq_f32(m.q[i], x.q[i], y.q[i])); }
inline F32 sqrt(F32 x) { SLMOPS_QUARTERS(F32, vsqrtq_f32(x.q[i])); }
inline Mask is_nan(F32 x) { SLMOPS_QUARTERS(Mask, vmvnq_u32(vceqq_f32(x.q[i], x.q[i]))); }
inline F32 swap_pairs(F32 x) { SLMOPS_QUARTERS(F32, vrev64q_f32(x.q[i])); }
inline float reduce_add(F32 x) {
  const float32x4_t eights = vaddq_f32(vaddq_f32(x.q[0], x.q[2]), vaddq_f32(x.q[1], x.q[3]));
  const float32x2_t twos = vadd_f32(vget_low_f32(eights), vget_high_f32(eights));
  return vget_lane_f32(vpadd_f32(twos, twos), 0);
}
inline float reduce_max(F32 x) {
  return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(x.q[0], x.q[1]), vmaxnmq_f32(x.q[2], x.q[3])));
}
/// Lane i of rows[j] becomes lane j of columns[i].
inline void transpose4(const float32x4_t (&rows)[4], float32x4_t (&columns)[4]) {
  const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(rows[0], rows[1]));
  const float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(rows[0], rows[1]));
  const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(rows[2], rows[3]));
  const float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(rows[2], rows[3]));
  columns[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
  columns[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
  columns[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
  columns[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}
inline void transpose(F32 (&x)[16]) {
  F32 y[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const float32x4_t rows[4] = {x[4 * i].q[j], x[4 * i + 1].q[j], x[4 * i + 2].q[j],
                                   x[4 * i + 3].q[j]};
      float32x4_t columns[4];
      transpose4(rows, columns);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) y[4 * j + k].q[i] = columns[k];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) x[i] = y[i];
}

// --- int32 ---
inline I32 splat_i32(int32_t x) { SLMOPS_QUARTERS(I32, (void(i), vdupq_n_s32(x))); }
inline I32 load_i32(const int32_t* p) { SLMOPS_QUARTERS(I32, vld1q_s32(p + 4 * i)); }
inline void store_i32(int32_t* p, I32 x) {
  vst1q_s32(p, x.q[0]);
  vst1q_s32(p + 4, x.q[1]);
  vst1q_s32(p + 8, x.q[2]);
  vst1q_s32(p + 12, x.q[3]);
}
/// Eight 16-bit values at any address.
inline uint16x8_t load_halves(const void* p) {
  return vreinterpretq_u16_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
}
inline I32 load_i16(const uint8_t* p) {
  const int16x8_t a = vreinterpretq_s16_u16(load_halves(p));
  const int16x8_t b = vreinterpretq_s16_u16(load_halves(p + 16));
  return {{vmovl_s16(vget_low_s16(a)), vmovl_high_s16(a), vmovl_s16(vget_low_s16(b)),
           vmovl_high_s16(b)}};
}
inline I32 operator+(I32 x, I32 y) { SLMOPS_QUARTERS(I32, vaddq_s32(x.q[i], y.q[i])); }
inline I32 operator*(I32 x, I32 y) { SLMOPS_QUARTERS(I32, vmulq_s32(x.q[i], y.q[i])); }
inline I32 operator&(I32 x, I32 y) { SLMOPS_QUARTERS(I32, vandq_s32(x.q[i], y.q[i])); }
inline I32 max(I32 x, I32 y) { SLMOPS_QUARTERS(I32, vmaxq_s32(x.q[i], y.q[i])); }
template <int kBits>
inline I32 shift_right(I32 x) {
  SLMOPS_QUARTERS(I32, vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x.q[i]), kBits)));
}
template <int kBits>
inline I32 shift_left(I32 x) {
  SLMOPS_QUARTERS(I32, vshlq_n_s32(x.q[i], kBits));
}
inline int32_t reduce_max(I32 x) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.q[0], x.q[1]), vmaxq_s32(x.q[2], x.q[3])));
}
inline int32_t reduce_add(I32 x) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(x.q[0], x.q[1]), vaddq_s32(x.q[2], x.q[3])));
}

/// A general register to each q: that takes no slot of the vector pipes, as copies of one would.
inline I32 start_sum(int32_t x) {
  const auto copy = [&]() __attribute__((always_inline)) {
    int32x4_t q;
    asm volatile("dup %0.4s, %w1" : "=w"(q) : "r"(x));
    return q;
  };
  SLMOPS_QUARTERS(I32, (void(i), copy()));
}

// --- between them ---
/// The bits of 1.5 * 2^23: an int32 added to them is the float that is larger by that integer.
constexpr int32_t kSumBias = 0x4b400000;
/// SCVTF takes two slots of half of the pipes, a subtraction one of any.
inline F32 small_to_f32(I32 x) {
  SLMOPS_QUARTERS(F32, vsubq_f32(vreinterpretq_f32_s32(x.q[i]), vdupq_n_f32(12582912.0f)));
}
inline F32 to_f32(I32 x) { SLMOPS_QUARTERS(F32, vcvtq_f32_s32(x.q[i])); }
inline I32 round(F32 x) { SLMOPS_QUARTERS(I32, vcvtnq_s32_f32(x.q[i])); }
inline I32 bits_of(F32 x) { SLMOPS_QUARTERS(I32, vreinterpretq_s32_f32(x.q[i])); }
inline F32 from_bits(I32 x) { SLMOPS_QUARTERS(F32, vreinterpretq_f32_s32(x.q[i])); }
/// The low halves of two quarters.
inline int16x8_t low_halves(int32x4_t a, int32x4_t b) {
  return vuzp1q_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
}
inline void store_i8(int8_t* p, I32 x) {
  const int8x16_t a = vreinterpretq_s8_s16(low_halves(x.q[0], x.q[1]));
  const int8x16_t b = vreinterpretq_s8_s16(low_halves(x.q[2], x.q[3]));
  vst1q_s8(p, vuzp1q_s8(a, b));
}

// --- 16-bit floats ---
inline F32 load_f16(const void* p) {
  const float16x8_t a = vreinterpretq_f16_u16(load_halves(p));
  const float16x8_t b = vreinterpretq_f16_u16(load_halves(static_cast<const uint8_t*>(p) + 16));
  return {{vcvt_f32_f16(vget_low_f16(a)), vcvt_high_f32_f16(a), vcvt_f32_f16(vget_low_f16(b)),
           vcvt_high_f32_f16(b)}};
}
inline F32 load_bf16(const void* p) {
  const uint16x8_t a = load_halves(p), b = load_halves(static_cast<const uint8_t*>(p) + 16);
  return {{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(a), 16)),
           vreinterpretq_f32_u32(vshll_high_n_u16(a, 16)),
           vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(b), 16)),
           vreinterpretq_f32_u32(vshll_high_n_u16(b, 16))}};
}
inline float32x4_t canonical_nan(float32x4_t x) {
  const float32x4_t nan = vreinterpretq_f32_u32(vdupq_n_u32(0x7fc00000u));
  return vbslq_f32(vceqq_f32(x, x), x, nan);
}
inline F32 canonical_nan(F32 x) { SLMOPS_QUARTERS(F32, canonical_nan(x.q[i])); }
/// FCVTN is correctly rounded and keeps denormals under an FpScope.
inline float16x8_t narrow_f16(float32x4_t a, float32x4_t b) {
  return vcvt_high_f16_f32(vcvt_f16_f32(canonical_nan(a)), canonical_nan(b));
}
inline void store_f16(void* p, F32 x) {
  uint8_t* out = static_cast<uint8_t*>(p);
  vst1q_u8(out, vreinterpretq_u8_f16(narrow_f16(x.q[0], x.q[1])));
  vst1q_u8(out + 16, vreinterpretq_u8_f16(narrow_f16(x.q[2], x.q[3])));
}
/// The bits of x rounded to bf16, in the high halves.
inline uint16x8_t round_bf16(float32x4_t x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(canonical_nan(x));
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vreinterpretq_u16_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))));
}
inline void store_bf16(void* p, F32 x) {
  uint8_t* out = static_cast<uint8_t*>(p);
  vst1q_u8(out, vreinterpretq_u8_u16(vuzp2q_u16(round_bf16(x.q[0]), round_bf16(x.q[1]))));
  vst1q_u8(out + 16, vreinterpretq_u8_u16(vuzp2q_u16(round_bf16(x.q[2]), round_bf16(x.q[3]))));
}

// --- lines and what dots need ---
inline Line load_line(const uint8_t* p) { SLMOPS_QUARTERS(Line, vld1q_u8(p + 16 * i)); }
inline void store_line(uint8_t* p, Line x) {
  vst1q_u8(p, x.q[0]);
  vst1q_u8(p + 16, x.q[1]);
  vst1q_u8(p + 32, x.q[2]);
  vst1q_u8(p + 48, x.q[3]);
}
inline Line low_nibbles(Line x) { SLMOPS_QUARTERS(Line, vandq_u8(x.q[i], vdupq_n_u8(15))); }
inline Line high_nibbles(Line x) { SLMOPS_QUARTERS(Line, vshrq_n_u8(x.q[i], 4)); }
template <int kByte>
inline int32x4_t lane_byte(uint8x16_t x) {
  uint32x4_t lanes = vreinterpretq_u32_u8(x);
  if constexpr (kByte > 0) lanes = vshrq_n_u32(lanes, 8 * kByte);
  if constexpr (kByte < 3) lanes = vandq_u32(lanes, vdupq_n_u32(255));
  return vreinterpretq_s32_u32(lanes);
}
template <int kByte>
inline I32 lane_byte(Line x) {
  SLMOPS_QUARTERS(I32, lane_byte<kByte>(x.q[i]));
}
/// Four words of a block's row: the part of Block that both sets share.
struct BlockWords {
  static int32x4_t load_four(const int32_t* p) { return vld1q_s32(p); }
  static float32x4_t load_four(const float* p) { return vld1q_f32(p); }
  static uint32x4_t bits(int32x4_t x) { return vreinterpretq_u32_s32(x); }
  static uint32x4_t bits(float32x4_t x) { return vreinterpretq_u32_f32(x); }
};
inline Codes load_codes(const int8_t* p) { return vld1q_s8(p); }
inline Dot4 dot4_begin(I32 acc) { return acc; }
inline I32 dot4_end(I32 /*acc*/, Dot4 d) { return d; }
inline int32_t sub_preset(int32_t preset) { return preset; }
inline Dot4 sub_begin(int32_t preset) { return start_sum(preset); }
/// Sub-scales of 16 bits: a sum of 16 k fits that too, and products widen.
struct SubScales {
  int16x8_t q[2];

  operator I32() const {
    return {{vmovl_s16(vget_low_s16(q[0])), vmovl_high_s16(q[0]), vmovl_s16(vget_low_s16(q[1])),
             vmovl_high_s16(q[1])}};
  }
};
inline int16x8_t sub_scales(uint16x8_t x, int j) {
  const uint16x8_t low = vdupq_n_u16(15);
  switch (j) {
    case 0:
      return vreinterpretq_s16_u16(vandq_u16(x, low));
    case 1:
      return vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(x, 4), low));
    case 2:
      return vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(x, 8), low));
    default:
      return vreinterpretq_s16_u16(vshrq_n_u16(x, 12));
  }
}
inline SubScales sub_scales(const uint8_t* p, int j) {
  return {{sub_scales(load_halves(p), j), sub_scales(load_halves(p + 16), j)}};
}
inline I32 sub_end(I32 acc, Dot4 d, SubScales sub) {
  const int16x8_t a = low_halves(d.q[0], d.q[1]), b = low_halves(d.q[2], d.q[3]);
  return {{vmlal_s16(acc.q[0], vget_low_s16(a), vget_low_s16(sub.q[0])),
           vmlal_high_s16(acc.q[1], a, sub.q[0]),
           vmlal_s16(acc.q[2], vget_low_s16(b), vget_low_s16(sub.q[1])),
           vmlal_high_s16(acc.q[3], b, sub.q[1])}};
}
inline int32x4_t dot(int32x4_t acc, Weights w, Codes a, int quad) {
  // The instruction has its number as an immediate.
  switch (quad) {
    case 0:
      return SLMOPS_LANE_DOT(acc, w, a, 0);
    case 1:
      return SLMOPS_LANE_DOT(acc, w, a, 1);
    case 2:
      return SLMOPS_LANE_DOT(acc, w, a, 2);
    default:
      return SLMOPS_LANE_DOT(acc, w, a, 3);
  }
}
inline Dot4 dot4(Dot4 d, Line u, Codes a, int quad) {
  SLMOPS_QUARTERS(Dot4, dot(d.q[i], as_weights(u.q[i]), a, quad));
}
/// Two quarters at a time, one load: whole lines of nibbles are half of the registers.
template <int kRows, int kLines>
inline void dot4_rows(Dot4 (&d)[kRows][kLines], int l, const uint8_t* line, const int8_t* codes,
                      int64_t stride, int quad) {
  Codes a[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) a[r] = load_codes(codes + r * stride);
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    const uint8x16_t both[2] = {vld1q_u8(line + 16 * i), vld1q_u8(line + 16 * i + 16)};
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Weights low = as_weights(vandq_u8(both[j], vdupq_n_u8(15)));
      const Weights high = as_weights(vshrq_n_u8(both[j], 4));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) d[r][l].q[i + j] = dot(d[r][l].q[i + j], low, a[r], quad);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        d[r][l].q[i + j] = dot(d[r][l].q[i + j], high, a[r], quad + 1);
    }
  }
}
inline Bytes bytes(Line x) { SLMOPS_QUARTERS(Bytes, byte_weights(x.q[i])); }
inline I32 dot8(I32 acc, Bytes u, Codes a, int quad) {
  SLMOPS_QUARTERS(I32, dot(acc.q[i], u.q[i], a, quad));
}
inline void sums_of_16(const int8_t* codes, int32_t* out) {
  const auto sum = [&](int i) { return vpaddlq_s16(vpaddlq_s8(vld1q_s8(codes + 16 * i))); };
  vst1q_s32(out, vpaddq_s32(vpaddq_s32(sum(0), sum(1)), vpaddq_s32(sum(2), sum(3))));
}
inline uint8x16_t expand(uint8x16_t u, int32x4_t sub) {
  const uint8x16_t s = vreinterpretq_u8_s32(vmulq_n_s32(sub, 0x01010101));
  return vmlaq_u8(vdupq_n_u8(128), vsubq_u8(u, vdupq_n_u8(8)), s);
}
inline Line expand(Line u, I32 sub) { SLMOPS_QUARTERS(Line, expand(u.q[i], sub.q[i])); }

#undef SLMOPS_LANE_DOT
#undef SLMOPS_QUARTERS

}  // namespace
}  // namespace slmops::SLMOPS_ISA

#include "times_power.h"
