// The integer dots of the SIMD contract on AVX2: u8 times s8 by vpmaddubsw, in int16.
#pragma once
#include "avx2.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr int kMaxRows = 4;
constexpr int kWideRows = 1;  // 4 rows x 16 outputs: 8 int16 sums, 4 weights, 1 broadcast of 16 ymm
constexpr int kSubBlockRows = 0;
constexpr int kStreamRows = 1;  // with more, each half of a tile is a pass of its own
constexpr int32_t kDot8Bias = 128;
constexpr int kLongSums = 1;
constexpr int kExpandRows = 0;  // a u8 dot takes two multiplies and a sign here, a u4 dot one

/// int16 pairs: 8 products of 15 * 127 * 2 reach 30480, so a sum of 8 cannot saturate.
struct Dot4 {
  __m256i a, b;
};
/// Signed weights and their magnitudes: maddubs of two full-range operands would saturate at 255 *
/// 127 * 2.
struct Bytes {
  __m256i a, b, abs_a, abs_b;
};

inline Dot4 dot4_begin(I32 /*acc*/) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Dot4 dot4(Dot4 d, Line u, Codes a, int quad) {
  const __m256i codes = splat_codes(a + 4 * quad);
  return {_mm256_add_epi16(d.a, _mm256_maddubs_epi16(u.a, codes)),
          _mm256_add_epi16(d.b, _mm256_maddubs_epi16(u.b, codes))};
}
inline I32 dot4_end(I32 acc, Dot4 d) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(d.a, ones)),
          _mm256_add_epi32(acc.b, _mm256_madd_epi16(d.b, ones))};
}
/// The preset stands in the low int16 of a pair; 4 products and it reach 15240 + 16256, which fits.
inline int32_t sub_preset(int32_t preset) { return preset & 0xffff; }
inline Dot4 sub_begin(int32_t preset) {
  const __m256i p = _mm256_set1_epi32(preset);
  return {p, p};
}
/// Both halves of a lane hold the sub-scale: madd scales and widens the int16 pair at once.
inline I32 sub_scales(const uint8_t* p, int j) {
  const __m256i pairs = _mm256_permute4x64_epi64(load_ymm(p), 0xd8);
  const __m256i s = _mm256_and_si256(_mm256_srli_epi16(pairs, 4 * j), _mm256_set1_epi16(15));
  return {_mm256_unpacklo_epi16(s, s), _mm256_unpackhi_epi16(s, s)};
}
inline I32 sub_end(I32 acc, Dot4 d, I32 sub) {
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(d.a, sub.a)),
          _mm256_add_epi32(acc.b, _mm256_madd_epi16(d.b, sub.b))};
}
inline Bytes bytes(Line x) {
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  const __m256i a = _mm256_xor_si256(x.a, flip), b = _mm256_xor_si256(x.b, flip);
  return {a, b, _mm256_abs_epi8(a), _mm256_abs_epi8(b)};
}
inline I32 dot8(I32 acc, Bytes u, Codes a, int quad) {
  const __m256i codes = splat_codes(a + 4 * quad), ones = _mm256_set1_epi16(1);
  const __m256i p = _mm256_maddubs_epi16(u.abs_a, _mm256_sign_epi8(codes, u.a));
  const __m256i q = _mm256_maddubs_epi16(u.abs_b, _mm256_sign_epi8(codes, u.b));
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(p, ones)),
          _mm256_add_epi32(acc.b, _mm256_madd_epi16(q, ones))};
}
inline Line expand(Line u, I32 sub) { return {expand(u.a, sub.a), expand(u.b, sub.b)}; }

}  // namespace
}  // namespace slmops::SLMOPS_ISA
