// The SIMD contract on AVX2, FMA and F16C, except its integer dots: a vector is two ymm. scalar.h
// documents the functions. avx2_dots.h and avx_vnni_dots.h complete it.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "compiler.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr int kLanes = 16;
constexpr bool kDotsByRows = false;
constexpr bool kBlocks = false;
struct Block;
constexpr int32_t kSumBias = 0;
constexpr int kFloatSums = 4;  // 8 of 16 ymm

inline void prefetch(const uint8_t* p) { SLMOPS_PREFETCH(p); }
inline void prefetch_l2(const uint8_t* p) { SLMOPS_PREFETCH_L2(p); }

struct F32 {
  __m256 a, b;
};
struct I32 {
  __m256i a, b;
};
using Mask = F32;
struct Line {
  __m256i a, b;
};

inline F32 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline F32 operator+(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F32 operator-(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F32 operator*(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F32 operator/(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F32 fma(F32 x, F32 y, F32 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline F32 fnma(F32 x, F32 y, F32 z) {
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
inline F32 min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Mask operator<(F32 x, F32 y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)};
}
inline F32 select(Mask m, F32 x, F32 y) {
  return {_mm256_blendv_ps(y.a, x.a, m.a), _mm256_blendv_ps(y.b, x.b, m.b)};
}
inline F32 sqrt(F32 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
inline Mask is_nan(F32 x) {
  return {_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q)};
}
inline F32 swap_pairs(F32 x) {
  return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)};
}
inline float reduce_add(F32 x) {
  const __m256 y = _mm256_add_ps(x.a, x.b);
  __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
inline float reduce_max(F32 x) {
  const __m256 y = _mm256_max_ps(x.a, x.b);
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}
/// Writes the 8 x 8 floats of in[0..7], transposed, to out[0..7].
inline void transpose8(const __m256 (&in)[8], __m256 (&out)[8]) {
  __m256 t[8], r[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(in[i], in[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(in[i], in[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    out[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
}
inline void transpose(F32 (&x)[16]) {
  F32 y[16];
  for (int i = 0; i < 16; i += 8) {
    __m256 a[8], b[8], from[8];
    for (int j = 0; j < 8; ++j) from[j] = x[i + j].a;
    transpose8(from, a);
    for (int j = 0; j < 8; ++j) from[j] = x[i + j].b;
    transpose8(from, b);
    for (int j = 0; j < 8; ++j) {
      (i == 0 ? y[j].a : y[j].b) = a[j];
      (i == 0 ? y[j + 8].a : y[j + 8].b) = b[j];
    }
  }
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

inline __m256i load_ymm(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline __m128i load_xmm(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline I32 splat_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I32 start_sum(int32_t x) { return splat_i32(x); }
inline I32 load_i32(const int32_t* p) { return {load_ymm(p), load_ymm(p + 8)}; }
inline void store_i32(int32_t* p, I32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
inline I32 load_i16(const uint8_t* p) {
  return {_mm256_cvtepi16_epi32(load_xmm(p)), _mm256_cvtepi16_epi32(load_xmm(p + 16))};
}
inline I32 operator+(I32 x, I32 y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
inline I32 operator*(I32 x, I32 y) {
  return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)};
}
inline I32 operator&(I32 x, I32 y) {
  return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
inline I32 max(I32 x, I32 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
template <int kBits>
inline I32 shift_right(I32 x) {
  return {_mm256_srli_epi32(x.a, kBits), _mm256_srli_epi32(x.b, kBits)};
}
template <int kBits>
inline I32 shift_left(I32 x) {
  return {_mm256_slli_epi32(x.a, kBits), _mm256_slli_epi32(x.b, kBits)};
}
inline int32_t reduce_max(I32 x) {
  const __m256i y = _mm256_max_epi32(x.a, x.b);
  __m128i z = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(z, _mm_shuffle_epi32(z, 0xb1)));
}
inline int32_t reduce_add(I32 x) {
  const __m256i y = _mm256_add_epi32(x.a, x.b);
  __m128i z = _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  z = _mm_add_epi32(z, _mm_shuffle_epi32(z, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(z, _mm_shuffle_epi32(z, 0xb1)));
}

inline F32 to_f32(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline F32 small_to_f32(I32 x) { return to_f32(x); }
inline I32 round(F32 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline I32 bits_of(F32 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline F32 from_bits(I32 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
/// 16 lanes as 16-bit values, which they must fit (unsigned).
inline __m256i narrow_u16(I32 x) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
}
inline void store_i8(int8_t* p, I32 x) {
  const __m256i low = _mm256_set1_epi32(0xff);
  const __m256i h = narrow_u16(x & I32{low, low});
  const __m128i q = _mm_packus_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), q);
}

inline F32 load_f16(const void* p) {
  const uint8_t* q = static_cast<const uint8_t*>(p);
  return {_mm256_cvtph_ps(load_xmm(q)), _mm256_cvtph_ps(load_xmm(q + 16))};
}
inline F32 load_bf16(const void* p) {
  const uint8_t* q = static_cast<const uint8_t*>(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_xmm(q)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_xmm(q + 16)), 16))};
}
inline __m256 canonical_nan(__m256 x) {
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
inline F32 canonical_nan(F32 x) { return {canonical_nan(x.a), canonical_nan(x.b)}; }
inline void store_f16(void* p, F32 x) {
  __m128i* q = static_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(canonical_nan(x.a), _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(canonical_nan(x.b), _MM_FROUND_TO_NEAREST_INT));
}
inline __m256i round_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(canonical_nan(x));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_srli_epi32(up, 16);
}
inline void store_bf16(void* p, F32 x) {
  const __m256i h = narrow_u16({round_bf16(x.a), round_bf16(x.b)});
  _mm256_storeu_si256(static_cast<__m256i*>(p), h);
}

inline Line load_line(const uint8_t* p) { return {load_ymm(p), load_ymm(p + 32)}; }
inline void store_line(uint8_t* p, Line x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
}
inline Line low_nibbles(Line x) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline Line high_nibbles(Line x) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), m),
          _mm256_and_si256(_mm256_srli_epi16(x.b, 4), m)};
}
template <int kByte>
inline I32 lane_byte(Line x) {
  const __m256i m = _mm256_set1_epi32(255);
  return {_mm256_and_si256(_mm256_srli_epi32(x.a, 8 * kByte), m),
          _mm256_and_si256(_mm256_srli_epi32(x.b, 8 * kByte), m)};
}
/// Quads are broadcast from memory.
using Codes = const int8_t*;
inline Codes load_codes(const int8_t* p) { return p; }
inline __m256i splat_codes(const int8_t* a) {
  int32_t four;
  memcpy(&four, a, sizeof(four));
  return _mm256_set1_epi32(four);
}
/// The sums of 16 codes in each half, in all its lanes.
inline __m256i sums_of_16(const int8_t* codes) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load_ymm(codes));
  const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  const __m256i eights = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0xb1));
  return _mm256_add_epi32(eights, _mm256_shuffle_epi32(eights, 0x4e));
}
inline void sums_of_16(const int8_t* codes, int32_t* out) {
  const __m256i a = sums_of_16(codes), b = sums_of_16(codes + 32);
  const __m256i both = _mm256_unpacklo_epi32(a, b);  // a's and b's first sums, then their second
  const __m256i sums = _mm256_permutevar8x32_epi32(both, _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(sums));
}
/// Two codes of a 16-bit half times their sub-scale: each product is below 256, so none carries.
inline __m256i expand(__m256i u, __m256i sub) {
  const __m256i eight = _mm256_or_si256(_mm256_slli_epi16(sub, 3), _mm256_slli_epi16(sub, 11));
  const __m256i shift = _mm256_sub_epi8(_mm256_set1_epi8(-128), eight);
  return _mm256_add_epi8(_mm256_mullo_epi16(u, sub), shift);
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA

#include "times_power.h"
