// The AVX-512 intrinsics of csrc/simd/avx512.h in plain C++, after Intel's descriptions; for tests
// only.
//
// It checks the arithmetic of that header and of the kernels over it, not the compiled row: that
// needs the hardware. Nothing here comes from csrc/simd/scalar.h, so that the two are independent.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace avx512_emulation {

template <int kBytes>
struct Bits {
  uint8_t byte[kBytes];
};

template <class T, int kCount>
struct Lanes {
  T lane[kCount];
  T& operator[](int i) { return lane[i]; }
  const T& operator[](int i) const { return lane[i]; }
};

template <class T, int kBytes>
Lanes<T, kBytes / static_cast<int>(sizeof(T))> lanes(const Bits<kBytes>& x) {
  Lanes<T, kBytes / static_cast<int>(sizeof(T))> out;
  std::memcpy(&out, &x, kBytes);
  return out;
}

template <class T, int kCount>
Bits<kCount* static_cast<int>(sizeof(T))> bits(const Lanes<T, kCount>& x) {
  Bits<kCount* static_cast<int>(sizeof(T))> out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}

}  // namespace avx512_emulation

// The names of <immintrin.h>, which no file that includes this one includes.
using __m512i = avx512_emulation::Bits<64>;
using __m256i = avx512_emulation::Bits<32>;
using __m128i = avx512_emulation::Bits<16>;
struct __m512 {
  avx512_emulation::Lanes<float, 16> v;
};
using __mmask16 = uint16_t;

enum { _CMP_LT_OQ = 17, _CMP_UNORD_Q = 3, _MM_FROUND_TO_NEAREST_INT = 0 };
enum { _MM_PERM_CDAB = 0xb1, _MM_PERM_BADC = 0x4e };

namespace avx512_emulation {

/// f of each lane of one or two vectors, as T.
template <class T, class F>
__m512i map(const __m512i& a, const F& f) {
  auto x = lanes<T>(a);
  for (auto& lane : x.lane) lane = static_cast<T>(f(lane));
  return bits(x);
}
template <class T, class F>
__m512i map(const __m512i& a, const __m512i& b, const F& f) {
  auto x = lanes<T>(a);
  const auto y = lanes<T>(b);
  for (int i = 0; i < 64 / static_cast<int>(sizeof(T)); ++i) x[i] = static_cast<T>(f(x[i], y[i]));
  return bits(x);
}
template <class F>
__m512 map(const __m512& a, const __m512& b, const F& f) {
  __m512 r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(a.v[i], b.v[i]);
  return r;
}
template <class F>
__m512 map(const __m512& a, const __m512& b, const __m512& c, const F& f) {
  __m512 r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(a.v[i], b.v[i], c.v[i]);
  return r;
}
template <class T>
__m512i splat(T x) {
  Lanes<T, 64 / static_cast<int>(sizeof(T))> r;
  for (T& lane : r.lane) lane = x;
  return bits(r);
}
/// Converts 16 lanes.
template <class To, class From, int kBytes, class F>
Bits<16 * static_cast<int>(sizeof(To))> convert(const Bits<kBytes>& a, const F& f) {
  const auto x = lanes<From>(a);
  Lanes<To, 16> r;
  for (int i = 0; i < 16; ++i) r[i] = static_cast<To>(f(x[i]));
  return bits(r);
}
inline uint32_t bits_of(float x) {
  uint32_t r;
  std::memcpy(&r, &x, sizeof(r));
  return r;
}

}  // namespace avx512_emulation

// --- fp32 ---
inline __m512 _mm512_set1_ps(float x) {
  __m512 r;
  for (float& lane : r.v.lane) lane = x;
  return r;
}
inline __m512 _mm512_loadu_ps(const void* p) {
  __m512 r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline void _mm512_storeu_ps(void* p, __m512 x) { std::memcpy(p, &x, sizeof(x)); }
inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
  return avx512_emulation::map(a, b, [](float x, float y) { return x + y; });
}
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) {
  return avx512_emulation::map(a, b, [](float x, float y) { return x - y; });
}
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
  return avx512_emulation::map(a, b, [](float x, float y) { return x * y; });
}
inline __m512 _mm512_div_ps(__m512 a, __m512 b) {
  return avx512_emulation::map(a, b, [](float x, float y) { return x / y; });
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return avx512_emulation::map(a, b, c,
                               [](float x, float y, float z) { return std::fmaf(x, y, z); });
}
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  return avx512_emulation::map(a, b, c,
                               [](float x, float y, float z) { return std::fmaf(-x, y, z); });
}
// The second operand where one is NaN or both are zeros.
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return avx512_emulation::map(a, b, [](float x, float y) { return x < y ? x : y; });
}
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return avx512_emulation::map(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline __m512 _mm512_sqrt_ps(__m512 a) {
  for (float& lane : a.v.lane) lane = std::sqrt(lane);
  return a;
}
/// a * 2^floor(b) with one rounding.
inline __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  for (int i = 0; i < 16; ++i) {
    a.v.lane[i] = std::ldexp(a.v.lane[i], static_cast<int>(std::floor(b.v.lane[i])));
  }
  return a;
}
/// In each four lanes, lane i from the lane that bits 2 i, 2 i + 1 of `order` name.
inline __m512 _mm512_permute_ps(__m512 a, int order) {
  __m512 r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i / 4 * 4 + (order >> (2 * (i % 4)) & 3)];
  return r;
}
/// In each four lanes: lanes 0 (or 2) of a and b, then lanes 1 (or 3).
inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  __m512 r;
  for (int i = 0; i < 16; ++i) r.v[i] = (i % 2 ? b : a).v[i / 4 * 4 + i % 4 / 2];
  return r;
}
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  __m512 r;
  for (int i = 0; i < 16; ++i) r.v[i] = (i % 2 ? b : a).v[i / 4 * 4 + 2 + i % 4 / 2];
  return r;
}
/// In each four lanes two of a, then two of b, chosen by bits 2 i, 2 i + 1 of `order`.
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int order) {
  __m512 r;
  for (int i = 0; i < 16; ++i) {
    r.v[i] = (i % 4 < 2 ? a : b).v[i / 4 * 4 + (order >> (2 * (i % 4)) & 3)];
  }
  return r;
}
/// The same with quarters of the vector in place of lanes.
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
  __m512 r;
  for (int i = 0; i < 16; ++i) r.v[i] = (i < 8 ? a : b).v[(order >> (i / 4 * 2) & 3) * 4 + i % 4];
  return r;
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    const float x = a.v[i], y = b.v[i];
    const bool holds = predicate == _CMP_LT_OQ ? x < y : x != x || y != y;
    mask |= static_cast<unsigned>(holds) << i;
  }
  return static_cast<__mmask16>(mask);
}
inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i) & 1) a.v[i] = b.v[i];
  }
  return a;
}
inline __m512i _mm512_castps_si512(__m512 a) { return avx512_emulation::bits(a.v); }
inline __m512 _mm512_castsi512_ps(__m512i a) { return {avx512_emulation::lanes<float>(a)}; }

// --- integers ---
inline __m512i _mm512_set1_epi8(char x) { return avx512_emulation::splat(x); }
inline __m512i _mm512_set1_epi16(short x) { return avx512_emulation::splat(x); }
inline __m512i _mm512_set1_epi32(int x) { return avx512_emulation::splat(x); }
inline __m512i _mm512_loadu_si512(const void* p) {
  __m512i r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline void _mm512_storeu_si512(void* p, __m512i x) { std::memcpy(p, &x, sizeof(x)); }
inline __m256i _mm256_loadu_si256(const __m256i* p) {
  __m256i r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline void _mm256_storeu_si256(__m256i* p, __m256i x) { std::memcpy(p, &x, sizeof(x)); }
inline void _mm_storeu_si128(__m128i* p, __m128i x) { std::memcpy(p, &x, sizeof(x)); }
// Unsigned lanes: sums and low halves of products are the same, and wrap without undefined
// behaviour.
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return avx512_emulation::map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
  return avx512_emulation::map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x - y; });
}
inline __m512i _mm512_mullo_epi32(__m512i a, __m512i b) {
  return avx512_emulation::map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x * y; });
}
inline __m512i _mm512_max_epi32(__m512i a, __m512i b) {
  return avx512_emulation::map<int32_t>(a, b, [](int32_t x, int32_t y) { return x > y ? x : y; });
}
inline __m512i _mm512_add_epi16(__m512i a, __m512i b) {
  return avx512_emulation::map<uint16_t>(a, b, [](unsigned x, unsigned y) { return x + y; });
}
inline __m512i _mm512_sub_epi16(__m512i a, __m512i b) {
  return avx512_emulation::map<uint16_t>(a, b, [](unsigned x, unsigned y) { return x - y; });
}
inline __m512i _mm512_mullo_epi16(__m512i a, __m512i b) {
  return avx512_emulation::map<uint16_t>(a, b, [](unsigned x, unsigned y) { return x * y; });
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
  return avx512_emulation::map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x & y; });
}
inline __m512i _mm512_or_si512(__m512i a, __m512i b) {
  return avx512_emulation::map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x | y; });
}
// A count of the lane's width or more gives 0.
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
  return avx512_emulation::map<uint32_t>(a, [n](uint32_t x) { return n > 31 ? 0 : x << n; });
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
  return avx512_emulation::map<uint32_t>(a, [n](uint32_t x) { return n > 31 ? 0 : x >> n; });
}
inline __m512i _mm512_slli_epi16(__m512i a, unsigned n) {
  return avx512_emulation::map<uint16_t>(a, [n](unsigned x) { return n > 15 ? 0 : x << n; });
}
inline __m512i _mm512_srli_epi16(__m512i a, unsigned n) {
  return avx512_emulation::map<uint16_t>(a, [n](unsigned x) { return n > 15 ? 0 : x >> n; });
}
inline __m512i _mm512_add_epi8(__m512i a, __m512i b) {
  return avx512_emulation::map<uint8_t>(a, b, [](unsigned x, unsigned y) { return x + y; });
}
inline __m512i _mm512_sub_epi8(__m512i a, __m512i b) {
  return avx512_emulation::map<uint8_t>(a, b, [](unsigned x, unsigned y) { return x - y; });
}
inline __m512i _mm512_setzero_si512() { return avx512_emulation::splat<uint64_t>(0); }
inline __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i,
                                 int j, int k, int l, int m, int n, int o, int p) {
  return avx512_emulation::bits(
      avx512_emulation::Lanes<int32_t, 16>{{a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p}});
}
/// Lane i of each four is their lane `order` bits 2i, 2i + 1.
inline __m512i _mm512_shuffle_epi32(__m512i a, int order) {
  const auto x = avx512_emulation::lanes<uint32_t>(a);
  auto r = x;
  for (int i = 0; i < 16; ++i) r[i] = x[i / 4 * 4 + ((order >> (i % 4 * 2)) & 3)];
  return avx512_emulation::bits(r);
}
inline __m512i _mm512_permutexvar_epi32(__m512i index, __m512i a) {
  const auto at = avx512_emulation::lanes<uint32_t>(index);
  const auto x = avx512_emulation::lanes<uint32_t>(a);
  auto r = x;
  for (int i = 0; i < 16; ++i) r[i] = x[static_cast<int>(at[i] % 16)];
  return avx512_emulation::bits(r);
}
inline __m128i _mm512_castsi512_si128(__m512i a) {
  __m128i r;
  std::memcpy(&r, &a, sizeof(r));
  return r;
}
inline int _mm512_reduce_max_epi32(__m512i a) {
  const auto x = avx512_emulation::lanes<int32_t>(a);
  int32_t r = x[0];
  for (const int32_t lane : x.lane) r = lane > r ? lane : r;
  return r;
}
inline int _mm512_reduce_add_epi32(__m512i a) {
  uint32_t r = 0;
  for (const uint32_t lane : avx512_emulation::lanes<uint32_t>(a).lane) r += lane;
  return static_cast<int>(r);
}

// --- between types ---
inline __m512i _mm512_cvtepi16_epi32(__m256i a) {
  return avx512_emulation::convert<int32_t, int16_t>(a, [](int16_t x) { return x; });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return avx512_emulation::convert<uint32_t, uint16_t>(a, [](uint16_t x) { return x; });
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
  return avx512_emulation::convert<uint8_t, uint32_t>(a, [](uint32_t x) { return x & 0xff; });
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  return avx512_emulation::convert<uint16_t, uint32_t>(a, [](uint32_t x) { return x & 0xffff; });
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  return _mm512_castsi512_ps(avx512_emulation::convert<float, int32_t>(
      a, [](int32_t x) { return static_cast<float>(x); }));
}
/// Rounds as the current mode says; what no int32 holds, NaN too, gives 0x80000000.
inline __m512i _mm512_cvtps_epi32(__m512 a) {
  return avx512_emulation::convert<int32_t, float>(avx512_emulation::bits(a.v), [](float x) {
    const float rounded = std::nearbyintf(x);
    return rounded >= -0x1p31f && rounded < 0x1p31f ? static_cast<int32_t>(rounded) : INT32_MIN;
  });
}
/// A NaN keeps its sign and payload and becomes quiet.
inline __m512 _mm512_cvtph_ps(__m256i a) {
  return _mm512_castsi512_ps(avx512_emulation::convert<uint32_t, uint16_t>(a, [](uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest > 0x7c00u) return sign | 0x7fc00000u | (rest & 0x3ffu) << 13;
    _Float16 value;
    std::memcpy(&value, &h, sizeof(value));
    return avx512_emulation::bits_of(static_cast<float>(value));
  }));
}
inline __m256i _mm512_cvtps_ph(__m512 a, int) {
  return avx512_emulation::convert<uint16_t, float>(avx512_emulation::bits(a.v), [](float x) {
    const uint32_t in = avx512_emulation::bits_of(x);
    if ((in & 0x7fffffffu) > 0x7f800000u) {
      return static_cast<uint16_t>((in >> 16 & 0x8000u) | 0x7e00u | (in >> 13 & 0x3ffu));
    }
    const _Float16 value = static_cast<_Float16>(x);
    uint16_t h;
    std::memcpy(&h, &value, sizeof(h));
    return h;
  });
}

// --- VNNI ---
/// acc + sum over 4 bytes of u8 * s8, in int32 that wraps.
inline __m512i _mm512_dpbusd_epi32(__m512i acc, __m512i u, __m512i s) {
  auto sum = avx512_emulation::lanes<uint32_t>(acc);
  const auto a = avx512_emulation::lanes<uint8_t>(u);
  const auto b = avx512_emulation::lanes<int8_t>(s);
  for (int i = 0; i < 64; ++i) sum[i / 4] += static_cast<uint32_t>(a[i] * b[i]);
  return avx512_emulation::bits(sum);
}
/// acc + sum over 2 int16 of s16 * s16, in int32 that wraps.
inline __m512i _mm512_dpwssd_epi32(__m512i acc, __m512i x, __m512i y) {
  auto sum = avx512_emulation::lanes<uint32_t>(acc);
  const auto a = avx512_emulation::lanes<int16_t>(x);
  const auto b = avx512_emulation::lanes<int16_t>(y);
  for (int i = 0; i < 32; ++i) sum[i / 2] += static_cast<uint32_t>(a[i] * b[i]);
  return avx512_emulation::bits(sum);
}
