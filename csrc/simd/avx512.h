// The SIMD contract on AVX-512 F, BW, DQ, VL and VNNI: a vector is one zmm. scalar.h documents the
// functions.
#pragma once
#ifdef SLMOPS_AVX512_EMULATION
#include SLMOPS_AVX512_EMULATION
#else
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "compiler.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr int kLanes = 16;
// 4 rows x 32 outputs take 8 int32 and 16 fp32 sums of 32 zmm; with 6 rows g++ spills (Zen 4: 57
// instead of 73 % of the peak for int8, group 32).
constexpr int kMaxRows = 4;
constexpr int kWideRows = 4;
constexpr int kSubBlockRows = 2;  // from memory 1.03 (1 row) and 1.1 (2 rows) times the speed
constexpr int kStreamRows = 32;
constexpr int32_t kDot8Bias = 0;
// With two dots a cycle (Zen 5, Intel's servers) 8 sums of 4 or 5 cycles each keep them just busy.
constexpr int kLongSums = 2;
constexpr int kExpandRows = 17;
constexpr bool kDotsByRows = false;
constexpr bool kBlocks = false;
struct Block;
constexpr int32_t kSumBias = 0;
constexpr int kFloatSums = 16;

inline void prefetch(const uint8_t* p) { SLMOPS_PREFETCH(p); }
inline void prefetch_l2(const uint8_t* p) { SLMOPS_PREFETCH_L2(p); }

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
using Mask = __mmask16;
struct Line {
  __m512i v;
};
struct Dot4 {
  __m512i v;
};
struct Bytes {
  __m512i v;
};
/// Quads are broadcast from memory.
using Codes = const int8_t*;

inline F32 splat(float x) { return {_mm512_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
inline F32 operator+(F32 x, F32 y) { return {_mm512_add_ps(x.v, y.v)}; }
inline F32 operator-(F32 x, F32 y) { return {_mm512_sub_ps(x.v, y.v)}; }
inline F32 operator*(F32 x, F32 y) { return {_mm512_mul_ps(x.v, y.v)}; }
inline F32 operator/(F32 x, F32 y) { return {_mm512_div_ps(x.v, y.v)}; }
inline F32 fma(F32 x, F32 y, F32 z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
inline F32 fnma(F32 x, F32 y, F32 z) { return {_mm512_fnmadd_ps(x.v, y.v, z.v)}; }
inline F32 min(F32 x, F32 y) { return {_mm512_min_ps(x.v, y.v)}; }
inline F32 max(F32 x, F32 y) { return {_mm512_max_ps(x.v, y.v)}; }
inline Mask operator<(F32 x, F32 y) { return _mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ); }
inline F32 select(Mask m, F32 x, F32 y) { return {_mm512_mask_blend_ps(m, y.v, x.v)}; }
inline F32 sqrt(F32 x) { return {_mm512_sqrt_ps(x.v)}; }
inline Mask is_nan(F32 x) { return _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q); }
inline F32 swap_pairs(F32 x) { return {_mm512_permute_ps(x.v, 0xb1)}; }
/// op of lanes 8 apart, then 4, 2, 1.
template <class Op>
inline float reduce(F32 x, const Op& op) {
  x = op(x, F32{_mm512_shuffle_f32x4(x.v, x.v, 0x4e)});
  x = op(x, F32{_mm512_shuffle_f32x4(x.v, x.v, 0xb1)});
  x = op(x, F32{_mm512_permute_ps(x.v, 0x4e)});
  return _mm512_cvtss_f32(op(x, swap_pairs(x)).v);
}
inline float reduce_add(F32 x) {
  return reduce(x, [](F32 a, F32 b) { return a + b; });
}
inline float reduce_max(F32 x) {
  return reduce(x, [](F32 a, F32 b) { return max(a, b); });
}
inline void transpose(F32 (&x)[16]) {
  __m512 t[16], r[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // a quarter L of r[4 g + i]: lanes 4 g.. of result 4 L + i
    const __m512 a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    x[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
    x[i + 4].v = _mm512_shuffle_f32x4(b, d, 0x88);
    x[i + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    x[i + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

inline I32 splat_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I32 start_sum(int32_t x) { return splat_i32(x); }
inline I32 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_i32(int32_t* p, I32 x) { _mm512_storeu_si512(p, x.v); }
inline __m256i load_ymm(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline I32 load_i16(const uint8_t* p) { return {_mm512_cvtepi16_epi32(load_ymm(p))}; }
inline I32 operator+(I32 x, I32 y) { return {_mm512_add_epi32(x.v, y.v)}; }
inline I32 operator*(I32 x, I32 y) { return {_mm512_mullo_epi32(x.v, y.v)}; }
inline I32 operator&(I32 x, I32 y) { return {_mm512_and_si512(x.v, y.v)}; }
inline I32 max(I32 x, I32 y) { return {_mm512_max_epi32(x.v, y.v)}; }
template <int kBits>
inline I32 shift_right(I32 x) {
  return {_mm512_srli_epi32(x.v, kBits)};
}
template <int kBits>
inline I32 shift_left(I32 x) {
  return {_mm512_slli_epi32(x.v, kBits)};
}
inline int32_t reduce_max(I32 x) { return _mm512_reduce_max_epi32(x.v); }
inline int32_t reduce_add(I32 x) { return _mm512_reduce_add_epi32(x.v); }

inline F32 to_f32(I32 x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline F32 small_to_f32(I32 x) { return to_f32(x); }
inline I32 round(F32 x) { return {_mm512_cvtps_epi32(x.v)}; }
inline I32 bits_of(F32 x) { return {_mm512_castps_si512(x.v)}; }
inline F32 from_bits(I32 x) { return {_mm512_castsi512_ps(x.v)}; }
inline F32 times_power(F32 x, I32 n) { return {_mm512_scalef_ps(x.v, to_f32(n).v)}; }
inline void store_i8(int8_t* p, I32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}

inline F32 load_f16(const void* p) { return {_mm512_cvtph_ps(load_ymm(p))}; }
inline F32 load_bf16(const void* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_ymm(p)), 16))};
}
inline F32 canonical_nan(F32 x) {
  const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), x.v, nan)};
}
inline void store_f16(void* p, F32 x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p),
                      _mm512_cvtps_ph(canonical_nan(x).v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_bf16(void* p, F32 x) {
  const __m512i bits = _mm512_castps_si512(canonical_nan(x).v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}

inline Line load_line(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_line(uint8_t* p, Line x) { _mm512_storeu_si512(p, x.v); }
inline Line low_nibbles(Line x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
inline Line high_nibbles(Line x) {
  return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))};
}
template <int kByte>
inline I32 lane_byte(Line x) {
  return {_mm512_and_si512(_mm512_srli_epi32(x.v, 8 * kByte), _mm512_set1_epi32(255))};
}
inline Codes load_codes(const int8_t* p) { return p; }
inline __m512i splat_codes(const int8_t* a) {
  int32_t four;
  memcpy(&four, a, sizeof(four));
  return _mm512_set1_epi32(four);
}
inline Dot4 dot4_begin(I32 acc) { return {acc.v}; }
inline Dot4 dot4(Dot4 d, Line u, Codes a, int quad) {
  return {_mm512_dpbusd_epi32(d.v, u.v, splat_codes(a + 4 * quad))};
}
inline I32 dot4_end(I32 /*acc*/, Dot4 d) { return {d.v}; }
inline int32_t sub_preset(int32_t preset) { return preset; }
inline Dot4 sub_begin(int32_t preset) { return {_mm512_set1_epi32(preset)}; }
/// The sub-scale stands in the low half of a lane, 0 in the high one: dpwssd multiplies the low
/// int16 of the dot.
inline I32 sub_scales(const uint8_t* p, int j) {
  const __m512i pairs = _mm512_cvtepu16_epi32(load_ymm(p));
  return {_mm512_and_si512(_mm512_srli_epi32(pairs, static_cast<unsigned>(4 * j)),
                           _mm512_set1_epi32(15))};
}
/// The dot of 16 k fits int16 (|sum of (u - 8) * a| <= 16256), so its low half is all of it.
inline I32 sub_end(I32 acc, Dot4 d, I32 sub) { return {_mm512_dpwssd_epi32(acc.v, d.v, sub.v)}; }
inline Bytes bytes(Line x) { return {x.v}; }
inline I32 dot8(I32 acc, Bytes u, Codes a, int quad) {
  return {_mm512_dpbusd_epi32(acc.v, u.v, splat_codes(a + 4 * quad))};
}
inline void sums_of_16(const int8_t* codes, int32_t* out) {
  const __m512i fours =
      _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_loadu_si512(codes));
  const __m512i eights = _mm512_add_epi32(fours, _mm512_shuffle_epi32(fours, _MM_PERM_CDAB));
  const __m512i sums = _mm512_add_epi32(eights, _mm512_shuffle_epi32(eights, _MM_PERM_BADC));
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm512_castsi512_si128(_mm512_permutexvar_epi32(first, sums)));
}
inline Line expand(Line u, I32 sub) {
  // Two codes of a 16-bit half times their sub-scale: each product is below 256, so none carries.
  const __m512i s = _mm512_or_si512(sub.v, _mm512_slli_epi32(sub.v, 16));
  const __m512i eight = _mm512_or_si512(_mm512_slli_epi16(s, 3), _mm512_slli_epi16(s, 11));
  const __m512i shift = _mm512_sub_epi8(_mm512_set1_epi8(-128), eight);
  return {_mm512_add_epi8(_mm512_mullo_epi16(u.v, s), shift)};
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
