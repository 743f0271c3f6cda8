// Activations to int8 codes: amax = max|x| of a group, scale = amax / 127, code = clamp(rne(x *
// (127 / amax)), -127, 127).
#pragma once
#include "common.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr int32_t kInfinityBits = 0x7f800000;
constexpr int32_t kTinyBits = 0x03800000;  // 2^-120: below it a group is all zeros

/// What a unit's sum of codes is multiplied by to preset its accumulators (see start_sums in
/// linear.h).
inline int32_t preset_factor(const Format& f) {
  if (f.zero_kind == ZeroKind::int16) return -1;
  if (f.zero_kind == ZeroKind::floating) return 1;
  return f.bits == 4 ? -8 : kDot8Bias - 128;
}

/// Codes of [k, k + unit) of a row into out; returns their sum.
inline int32_t quantize_unit(const SourceRows& src, int64_t row, int64_t k, int64_t unit,
                             int64_t columns, float inverse, int8_t* out) {
  const F32 r = splat(inverse), low = splat(-127.0f), high = splat(127.0f);
  I32 sum = splat_i32(0);
  for (int64_t i = k; i < k + unit; i += kLanes) {
    const I32 code = round(min(max(load_columns(src, row, i, columns) * r, low), high));
    store_i8(out + i, code);
    sum = sum + code;
  }
  return reduce_add(sum);
}

inline void quantize_row(const Format& f, const SourceRows& src, int64_t row, int8_t* codes,
                         float* scale, int32_t* presets) {
  const int64_t unit = preset_unit(f), groups = f.k_padded / f.act_group;
  const int32_t factor = preset_factor(f);
  int32_t* group_presets = presets + f.k_padded / unit;
  for (int64_t a = 0; a < groups; ++a) {
    const int64_t begin = a * f.act_group, end = begin + f.act_group;
    I32 magnitude = splat_i32(0);
    for (int64_t k = begin; k < end; k += kLanes) {
      magnitude = max(magnitude, bits_of(load_columns(src, row, k, f.k)) & splat_i32(0x7fffffff));
    }
    const int32_t amax_bits = reduce_max(magnitude);
    float amax;
    memcpy(&amax, &amax_bits, sizeof(amax));
    const bool zero = amax_bits < kTinyBits || amax_bits >= kInfinityBits;
    scale[a] = amax_bits >= kInfinityBits ? __builtin_nanf("") : zero ? 0.0f : amax / 127.0f;
    int32_t group_sum = 0;
    for (int64_t k = begin; k < end; k += unit) {
      int32_t sum = 0;
      if (zero) {
        memset(codes + k, 0, static_cast<size_t>(unit));
      } else {
        sum = quantize_unit(src, row, k, unit, f.k, 127.0f / amax, codes);
      }
      presets[k / unit] =
          f.scale_kind == ScaleKind::sub16 ? sub_preset(factor * sum) : factor * sum;
      group_sum += sum;
    }
    if (f.scale_kind == ScaleKind::sub16) group_presets[a] = (kDot8Bias - 128) * group_sum;
  }
}

inline void quantize_rows(const Format& f, const SourceRows& src, const QuantizedRows& out,
                          int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    quantize_row(f, src, row, out.codes + row * f.k_padded,
                 out.scale + row * (f.k_padded / f.act_group),
                 out.presets + row * presets_per_row(f));
  }
}

inline void widen_rows(const Format& f, const SourceRows& src, float* out, int64_t begin,
                       int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t k = 0; k < f.k_padded; k += kLanes) {
      store(out + row * f.k_padded + k, load_columns(src, row, k, f.k));
    }
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
