// The SIMD contract on NEON without the dots: a vector is four q registers. scalar.h documents the
// functions, neon_dotprod.h and neon_i8mm.h have the rest.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace slmops::SLMOPS_ISA {
namespace {

constexpr int kLanes = 16;
// 4 rows x 16 outputs: 16 int32 sums, 4 weights and 4 vectors of codes of 32 q; the fp32 sums wait
// in memory, which costs no slot of the vector pipes.
constexpr int kMaxRows = 4;
constexpr int kWideRows = 1;
constexpr int kSubBlockRows = 0;
constexpr int kStreamRows = 1;
constexpr int kFloatSums = 4;

inline void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

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

// --- between them ---
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
inline Codes load_codes(const int8_t* p) { return vld1q_s8(p); }
inline Dot4 dot4_begin(I32 acc) { return acc; }
inline I32 dot4_end(I32 /*acc*/, Dot4 d) { return d; }
inline int32_t sub_preset(int32_t preset) { return preset; }
inline Dot4 sub_begin(int32_t preset) { return splat_i32(preset); }
inline I32 sub_scales(const uint8_t* p, int j) {
  const int16x8_t right = vdupq_n_s16(static_cast<int16_t>(-4 * j));
  const uint16x8_t low = vdupq_n_u16(15);
  const uint16x8_t a = vandq_u16(vshlq_u16(load_halves(p), right), low);
  const uint16x8_t b = vandq_u16(vshlq_u16(load_halves(p + 16), right), low);
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(a))),
           vreinterpretq_s32_u32(vmovl_high_u16(a)),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(b))),
           vreinterpretq_s32_u32(vmovl_high_u16(b))}};
}
inline I32 sub_end(I32 acc, Dot4 d, I32 sub) {
  SLMOPS_QUARTERS(I32, vmlaq_s32(acc.q[i], d.q[i], sub.q[i]));
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

}  // namespace
}  // namespace slmops::SLMOPS_ISA

#include "times_power.h"
