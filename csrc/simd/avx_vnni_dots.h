// The integer dots of the SIMD contract on AVX2 with AVX-VNNI: u8 times s8 by vpdpbusd, in int32.
#pragma once
#include "avx2.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr int kMaxRows = 4;
constexpr int kWideRows = 1;  // 4 rows x 16 outputs: 8 sums, 4 weights, 1 broadcast of 16 ymm
constexpr int kSubBlockRows = 0;
constexpr int kStreamRows = 1;  // with more, each half of a tile is a pass of its own
constexpr int32_t kDot8Bias = 0;
constexpr int kLongSums = 1;
constexpr int kExpandRows = 17;

struct Dot4 {
  __m256i a, b;
};
struct Bytes {
  __m256i a, b;
};

inline Dot4 dot4_begin(I32 acc) { return {acc.a, acc.b}; }
inline Dot4 dot4(Dot4 d, Line u, Codes a, int quad) {
  const __m256i codes = splat_codes(a + 4 * quad);
  return {_mm256_dpbusd_avx_epi32(d.a, u.a, codes), _mm256_dpbusd_avx_epi32(d.b, u.b, codes)};
}
inline I32 dot4_end(I32 /*acc*/, Dot4 d) { return {d.a, d.b}; }
inline int32_t sub_preset(int32_t preset) { return preset; }
inline Dot4 sub_begin(int32_t preset) {
  const __m256i p = _mm256_set1_epi32(preset);
  return {p, p};
}
/// The sub-scale stands in the low half of a lane, 0 in the high one: dpwssd multiplies the low
/// int16 of the dot.
inline I32 sub_scales(const uint8_t* p, int j) {
  const __m256i fifteen = _mm256_set1_epi32(15);
  const __m256i a = _mm256_cvtepu16_epi32(load_xmm(p)), b = _mm256_cvtepu16_epi32(load_xmm(p + 16));
  return {_mm256_and_si256(_mm256_srli_epi32(a, 4 * j), fifteen),
          _mm256_and_si256(_mm256_srli_epi32(b, 4 * j), fifteen)};
}
/// The dot of 16 k fits int16 (|sum of (u - 8) * a| <= 16256), so its low half is all of it.
inline I32 sub_end(I32 acc, Dot4 d, I32 sub) {
  return {_mm256_dpwssd_avx_epi32(acc.a, d.a, sub.a), _mm256_dpwssd_avx_epi32(acc.b, d.b, sub.b)};
}
inline Bytes bytes(Line x) { return {x.a, x.b}; }
inline I32 dot8(I32 acc, Bytes u, Codes a, int quad) {
  const __m256i codes = splat_codes(a + 4 * quad);
  return {_mm256_dpbusd_avx_epi32(acc.a, u.a, codes), _mm256_dpbusd_avx_epi32(acc.b, u.b, codes)};
}
inline Line expand(Line u, I32 sub) {
  return {expand(u.a, _mm256_or_si256(sub.a, _mm256_slli_epi32(sub.a, 16))),
          expand(u.b, _mm256_or_si256(sub.b, _mm256_slli_epi32(sub.b, 16)))};
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
