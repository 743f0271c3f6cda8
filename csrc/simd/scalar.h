// The SIMD contract, and its reference in plain C++: everything a kernel may ask of an instruction
// set.
//
// A vector has 16 logical lanes on every row (1 zmm, 2 ymm, 4 q, an array). Each function below is
// documented here only; avx2.h and avx512.h define the same names with the same results, bit for
// bit. Arithmetic is IEEE fp32, round to nearest even, denormals kept: the caller's FpScope sees to
// that.
#pragma once
#include <cstdint>
#include <cstring>

#include "compiler.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr int kLanes = 16;

/// Rows that a matmul block has at most, and up to how many it keeps 32 outputs in registers,
/// not 16.
constexpr int kMaxRows = 1;  // arrays, not registers: larger blocks only take minutes to compile
constexpr int kWideRows = 0;
/// Rows up to which the dots of a whole sub16 block are kept in registers, so that it is read in
/// order.
constexpr int kSubBlockRows = 0;
/// Rows up to which `group` tiles are not walked in chunks: the weights come from memory, best in
/// one stream.
constexpr int kStreamRows = 0;
/// dot8 computes sum a * (u - kDot8Bias): 0 where the machine takes u as unsigned, 128 where as
/// signed.
constexpr int32_t kDot8Bias = 128;
/// Sums that a pass of kMaxRows rows adds the dots of a long unit to in turn, 1 or 2: more of them
/// are under way at once than the sums of a pass.
constexpr int kLongSums = 1;
/// Rows from which sub16 lines are expanded to int8 once for all of them; 0: never (a u8 dot costs
/// more than a u4 dot).
constexpr int kExpandRows = 0;
/// Whether int4 dots are those of dot4_rows, which takes a line from memory for all rows at once:
///     dot4_rows(Dot4 (&d)[rows][lines], int l, const uint8_t* line, const int8_t* codes,
///               int64_t stride, int quad)
/// adds to d[r][l] the low nibbles by `quad` of row r, whose 16 codes are at codes + r * stride,
/// and the high ones by the next.
constexpr bool kDotsByRows = false;
/// Whether more than kFewRows rows go in blocks of 8 rows x 4 outputs: 32 lanes, 2 vectors, in an
/// order of the set's own. Each 4 rows are a vector, each 2 rows half of one, a *pair*. `struct
/// Block` has static functions for them; 16 k of codes are 128 bytes, of operands 64, also in an
/// order of its own.
///     store_codes(int8_t* out, int row, Codes x)          16 k of one of the rows
///     store_int4(uint8_t* out, Line, Line)                16 k of 4 x 4 outputs, side by side
///     store_int8(out, const Line (&)[4])
///     store_sub16(out, Line, Line, const uint8_t* sub_scales, int j)    as expand
///     add(I32 (&sum)[2], const uint8_t* operands, const int8_t* codes)  16 k
///     spread(void* out, int pair, uint32_t a, uint32_t b)  to the lanes of its rows, of 32 at out
///     spread(void* out, int pair, Four a, Four b)          the same of load_four's words, 32 lanes
///                                                          for each of the four
///     store_factors(float* out, F32)   one for each of 16 outputs: kFactors floats for 4 of them
///     load_factors(const float*)       those of 4 outputs, for each vector of a block
///     load_sums(const float*, int64_t stride), store_sums(float*, stride, F32)  a vector's rows
constexpr bool kBlocks = false;
struct Block;
/// What start_sum may have added for small_to_f32 to convert the sum; 0 where that is to_f32.
constexpr int32_t kSumBias = 0;
/// Vectors of fp32 sums that a block of a float product keeps in registers, a power of two.
constexpr int kFloatSums = 1;
/// Asks for the cache line at p, to be read soon; prefetch_l2: into the second level only.
inline void prefetch(const uint8_t* p) { SLMOPS_PREFETCH(p); }
inline void prefetch_l2(const uint8_t* p) { SLMOPS_PREFETCH_L2(p); }

struct F32 {
  float v[16];
};
struct I32 {
  int32_t v[16];
};
struct Mask {
  bool v[16];
};
/// 64 bytes: 4 consecutive k of 16 outputs, output n in bytes 4n..4n+3.
struct Line {
  uint8_t v[64];
};
/// A running sum of dot4, between dot4_begin and dot4_end.
struct Dot4 {
  I32 sum;
};
/// A Line made ready for dot8.
struct Bytes {
  Line line;
};
/// 16 codes of one row, each for all lanes: quad q of them, 4 k, is what a dot takes.
using Codes = const int8_t*;

#define SLMOPS_LANES(expr)           \
  for (int i = 0; i < kLanes; ++i) { \
    expr;                            \
  }                                  \
  return r

// --- fp32 ---
inline F32 splat(float x) {
  F32 r;
  SLMOPS_LANES(r.v[i] = x);
}
/// From any address: packed weights have no alignment.
inline F32 load(const float* p) {
  F32 r;
  memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline void store(float* p, F32 x) { memcpy(p, x.v, sizeof(x.v)); }
inline F32 operator+(F32 a, F32 b) {
  F32 r;
  SLMOPS_LANES(r.v[i] = a.v[i] + b.v[i]);
}
inline F32 operator-(F32 a, F32 b) {
  F32 r;
  SLMOPS_LANES(r.v[i] = a.v[i] - b.v[i]);
}
inline F32 operator*(F32 a, F32 b) {
  F32 r;
  SLMOPS_LANES(r.v[i] = a.v[i] * b.v[i]);
}
inline F32 operator/(F32 a, F32 b) {
  F32 r;
  SLMOPS_LANES(r.v[i] = a.v[i] / b.v[i]);
}
/// a * b + c, rounded once.
inline F32 fma(F32 a, F32 b, F32 c) {
  F32 r;
  SLMOPS_LANES(r.v[i] = SLMOPS_FMAF(a.v[i], b.v[i], c.v[i]));
}
/// -(a * b) + c, rounded once.
inline F32 fnma(F32 a, F32 b, F32 c) {
  F32 r;
  SLMOPS_LANES(r.v[i] = SLMOPS_FMAF(-a.v[i], b.v[i], c.v[i]));
}
/// a < b ? a : b. Not for NaN, nor where the sign of a zero matters.
inline F32 min(F32 a, F32 b) {
  F32 r;
  SLMOPS_LANES(r.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]);
}
/// a > b ? a : b. Not for NaN, nor where the sign of a zero matters.
inline F32 max(F32 a, F32 b) {
  F32 r;
  SLMOPS_LANES(r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
inline Mask operator<(F32 a, F32 b) {
  Mask r;
  SLMOPS_LANES(r.v[i] = a.v[i] < b.v[i]);
}
/// mask ? a : b.
inline F32 select(Mask m, F32 a, F32 b) {
  F32 r;
  SLMOPS_LANES(r.v[i] = m.v[i] ? a.v[i] : b.v[i]);
}
/// Correctly rounded, as operator/ is.
inline F32 sqrt(F32 a) {
  F32 r;
  SLMOPS_LANES(r.v[i] = SLMOPS_SQRTF(a.v[i]));
}
inline Mask is_nan(F32 a) {
  Mask r;
  SLMOPS_LANES(r.v[i] = a.v[i] != a.v[i]);
}
/// Lanes 1, 0, 3, 2, ...
inline F32 swap_pairs(F32 a) {
  F32 r;
  SLMOPS_LANES(r.v[i] = a.v[i ^ 1]);
}

/// The sum of lanes: those 8 apart are added, then 4, 2, 1.
inline float reduce_add(F32 a) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    for (int i = 0; i < distance; ++i) a.v[i] = a.v[i] + a.v[i + distance];
  }
  return a.v[0];
}
/// Not for NaN, nor where the sign of a zero matters.
inline float reduce_max(F32 a) {
  for (int i = 1; i < kLanes; ++i) a.v[0] = a.v[i] > a.v[0] ? a.v[i] : a.v[0];
  return a.v[0];
}

/// Lane i of x[j] becomes lane j of x[i].
inline void transpose(F32 (&x)[16]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float lane = x[i].v[j];
      x[i].v[j] = x[j].v[i];
      x[j].v[i] = lane;
    }
  }
}

// --- int32 ---
inline I32 splat_i32(int32_t x) {
  I32 r;
  SLMOPS_LANES(r.v[i] = x);
}
inline I32 load_i32(const int32_t* p) {
  I32 r;
  SLMOPS_LANES(r.v[i] = p[i]);
}
inline void store_i32(int32_t* p, I32 x) { memcpy(p, x.v, sizeof(x.v)); }
/// The same as splat_i32, for what a few sums start from.
inline I32 start_sum(int32_t x) { return splat_i32(x); }
/// Sign-extends 16 int16 from any address.
inline I32 load_i16(const uint8_t* p) {
  int16_t h[16];
  memcpy(h, p, sizeof(h));
  I32 r;
  SLMOPS_LANES(r.v[i] = h[i]);
}
inline I32 operator+(I32 a, I32 b) {
  I32 r;
  SLMOPS_LANES(r.v[i] = a.v[i] + b.v[i]);
}
/// Low 32 bits of the product.
inline I32 operator*(I32 a, I32 b) {
  I32 r;
  SLMOPS_LANES(
      r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) * static_cast<uint32_t>(b.v[i])));
}
inline I32 operator&(I32 a, I32 b) {
  I32 r;
  SLMOPS_LANES(r.v[i] = a.v[i] & b.v[i]);
}
inline I32 max(I32 a, I32 b) {
  I32 r;
  SLMOPS_LANES(r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
/// Logical shift right.
template <int kBits>
inline I32 shift_right(I32 a) {
  I32 r;
  SLMOPS_LANES(r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> kBits));
}
/// Left, bits leave at the top.
template <int kBits>
inline I32 shift_left(I32 a) {
  I32 r;
  SLMOPS_LANES(r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << kBits));
}
inline int32_t reduce_max(I32 a) {
  int32_t r = a.v[0];
  for (int i = 1; i < kLanes; ++i) r = a.v[i] > r ? a.v[i] : r;
  return r;
}
inline int32_t reduce_add(I32 a) {
  int32_t r = 0;
  for (int i = 0; i < kLanes; ++i) r += a.v[i];
  return r;
}

// --- between them ---
inline F32 to_f32(I32 a) {
  F32 r;
  SLMOPS_LANES(r.v[i] = static_cast<float>(a.v[i]));
}
/// The same of x - kSumBias, which is below 2^22.
inline F32 small_to_f32(I32 x) { return to_f32(x); }
/// Nearest integer, ties to even; |x| < 2^22.
inline I32 round(F32 a) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum's last bit is worth 1
  I32 r;
  SLMOPS_LANES(r.v[i] = static_cast<int32_t>((a.v[i] + kMagic) - kMagic));
}
// Lane by lane: of a whole vector copied into the other type g++ 12 loses lanes (AArch64, -O3).
inline I32 bits_of(F32 a) {
  I32 r;
  SLMOPS_LANES(r.v[i] = __builtin_bit_cast(int32_t, a.v[i]));
}
inline F32 from_bits(I32 a) {
  F32 r;
  SLMOPS_LANES(r.v[i] = __builtin_bit_cast(float, a.v[i]));
}
/// x * 2^n with one rounding, 0.5 <= x < 2 and -252 <= n <= 129: defined in times_power.h.
inline F32 times_power(F32 x, I32 n);
/// Stores the low byte of each lane.
inline void store_i8(int8_t* p, I32 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}

// --- 16-bit floats, exact on load, one rounding on store; any address; a stored NaN is the
// canonical one ---
inline float widen_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = 0x7f800000u | ((magnitude & 0x3ff) << 13);
    if (magnitude > 0x7c00) bits |= 0x400000u;  // quiet, as F16C and FCVT do
  } else if (magnitude >= 0x400) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {
    const float tiny = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24, exact
    memcpy(&bits, &tiny, 4);
  }
  bits |= sign;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint16_t narrow_f16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  if (magnitude > 0x7f800000u) return 0x7e00;
  if (magnitude >= 0x477ff000u)
    return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (magnitude <
      0x38800000u) {  // below 2^-14: count in units of 2^-24, as adding 0.5 * 2^0 ... does exactly
    float m;
    memcpy(&m, &magnitude, 4);
    m += 0.5f;  // the last bit of a float in [0.5, 1) is worth 2^-24
    uint32_t units;
    memcpy(&units, &m, 4);
    return static_cast<uint16_t>(sign | (units - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
inline float widen_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint16_t narrow_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
/// x with every NaN made 0x7fc00000.
inline F32 canonical_nan(F32 x) {
  const uint32_t nan = 0x7fc00000u;
  for (float& lane : x.v) {
    if (lane != lane) memcpy(&lane, &nan, sizeof(lane));
  }
  return x;
}
inline F32 load_f16(const void* p) {
  uint16_t h[16];
  memcpy(h, p, sizeof(h));
  F32 r;
  SLMOPS_LANES(r.v[i] = widen_f16(h[i]));
}
inline F32 load_bf16(const void* p) {
  uint16_t h[16];
  memcpy(h, p, sizeof(h));
  F32 r;
  SLMOPS_LANES(r.v[i] = widen_bf16(h[i]));
}
inline void store_f16(void* p, F32 x) {
  uint16_t h[16];
  for (int i = 0; i < kLanes; ++i) h[i] = narrow_f16(x.v[i]);
  memcpy(p, h, sizeof(h));
}
inline void store_bf16(void* p, F32 x) {
  uint16_t h[16];
  for (int i = 0; i < kLanes; ++i) h[i] = narrow_bf16(x.v[i]);
  memcpy(p, h, sizeof(h));
}

// --- lines and integer dots: exact ---
inline Line load_line(const uint8_t* p) {
  Line r;
  memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline void store_line(uint8_t* p, Line x) { memcpy(p, x.v, sizeof(x.v)); }
inline Line low_nibbles(Line x) {
  for (uint8_t& b : x.v) b &= 15;
  return x;
}
inline Line high_nibbles(Line x) {
  for (uint8_t& b : x.v) b >>= 4;
  return x;
}
/// Byte kByte of every lane.
template <int kByte>
inline I32 lane_byte(Line x) {
  I32 r;
  SLMOPS_LANES(r.v[i] = x.v[4 * i + kByte]);
}
inline int32_t dot_lane(const uint8_t* u, const int8_t* a) {
  return u[0] * a[0] + u[1] * a[1] + u[2] * a[2] + u[3] * a[3];
}
inline Codes load_codes(const int8_t* p) { return p; }
/// Starts a sum of at most 8 dot4; dot4_end(acc, d) gives acc plus that sum, for the same acc.
inline Dot4 dot4_begin(I32 acc) { return {acc}; }
/// Adds sum over the 4 k of a quad of u * a, u in 0..15.
inline Dot4 dot4(Dot4 d, Line u, Codes a, int quad) {
  for (int i = 0; i < kLanes; ++i) d.sum.v[i] += dot_lane(u.v + 4 * i, a + 4 * quad);
  return d;
}
inline I32 dot4_end(I32 /*acc*/, Dot4 d) { return d.sum; }
/// A preset in -16256..16256 in the form that sub_begin takes.
inline int32_t sub_preset(int32_t preset) { return preset; }
/// Starts a sum of at most 4 dot4 from a preset; sub_end scales it.
inline Dot4 sub_begin(int32_t preset) { return {splat_i32(preset)}; }
/// Sub-scales of group j (0..3) of a block's 64-byte line, for outputs [0, 16) or, 32 bytes on,
/// [16, 32), in the form that sub_end takes.
inline I32 sub_scales(const uint8_t* p, int j) {
  I32 r;
  SLMOPS_LANES(r.v[i] = (p[2 * i + j / 2] >> (4 * (j % 2))) & 15);
}
/// acc + d * sub.
inline I32 sub_end(I32 acc, Dot4 d, I32 sub) { return acc + d.sum * sub; }
inline Bytes bytes(Line x) { return {x}; }
/// acc + sum over the 4 k of a quad of a * (u - kDot8Bias), u in 0..255.
inline I32 dot8(I32 acc, Bytes u, Codes codes, int quad) {
  const int8_t* a = codes + 4 * quad;
  const int32_t shift = kDot8Bias * (a[0] + a[1] + a[2] + a[3]);
  for (int i = 0; i < kLanes; ++i) acc.v[i] += dot_lane(u.line.v + 4 * i, a) - shift;
  return acc;
}
/// out[i] = the sum of codes 16i..16i+15, of 64.
inline void sums_of_16(const int8_t* codes, int32_t* out) {
  for (int i = 0; i < 4; ++i) {
    out[i] = 0;
    for (int j = 0; j < 16; ++j) out[i] += codes[16 * i + j];
  }
}
/// Bytes (u - 8) * sub + 128 of u in 0..15, sub from sub_scales: a sub16 line as int8.
inline Line expand(Line u, I32 sub) {
  for (int i = 0; i < 64; ++i) u.v[i] = static_cast<uint8_t>((u.v[i] - 8) * sub.v[i / 4] + 128);
  return u;
}

#undef SLMOPS_LANES

}  // namespace
}  // namespace slmops::SLMOPS_ISA

#include "times_power.h"
