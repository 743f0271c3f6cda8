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
  if (f.zero_kind != ZeroKind::none) return 1;
  return f.bits == 4 ? -8 : kDot8Bias - 128;
}

/// Bits of the largest |x| of [begin, end).
template <class Row>
SLMOPS_INLINE int32_t largest_bits(const Row& row, int64_t begin, int64_t end) {
  I32 magnitude = splat_i32(0);
  for (int64_t k = begin; k < end; k += kLanes) {
    magnitude = max(magnitude, bits_of(row(k)) & splat_i32(0x7fffffff));
  }
  return reduce_max(magnitude);
}

/// Codes of [begin, end) into out; returns their sum.
template <class Row>
SLMOPS_INLINE int32_t round_columns(const Row& row, int64_t begin, int64_t end, F32 r,
                                    int8_t* out) {
  const F32 low = splat(-127.0f), high = splat(127.0f);
  I32 sum = splat_i32(0);
  for (int64_t k = begin; k < end; k += kLanes) {
    const I32 code = round(min(max(row(k) * r, low), high));
    store_i8(out + k, code);
    sum = sum + code;
  }
  return reduce_add(sum);
}

/// Row `row` of `rows`, as if it were the only one.
inline QuantizedRows row_of(const Format& f, const QuantizedRows& rows, int64_t row) {
  return {rows.codes + row * f.k_padded, rows.scale + row * (f.k_padded / f.act_group),
          rows.presets + row * presets_per_row(f), nullptr};
}

static_assert(kCodeBlocks || !kBlocks);

/// Codes [begin, end) of rows [row, row + rows) once more, in blocks of rows.
template <class B>
inline void fill_code_blocks(const Format& f, const QuantizedRows& all, int64_t row, int64_t rows,
                             int64_t begin, int64_t end) {
  if (all.blocks == nullptr) return;
  for (int64_t i = row; i < row + rows; ++i) {
    const int8_t* codes = all.codes + i * f.k_padded;
    int8_t* block = all.blocks + i / kCodeRows * kCodeRows * f.k_padded;
    const int place = static_cast<int>(i % kCodeRows);
    for (int64_t k = begin; k < end; k += 16) {
      B::store_codes(block + k * kCodeRows, place, load_codes(codes + k));
    }
  }
}

/// Presets of columns [begin, end) of sub16 rows [row, row + rows), whole blocks: of their units,
/// and of their activation groups. Row by row, codes and sums would be read while their narrower
/// stores are still under way, which stalls.
inline void sub16_presets(const Format& f, const QuantizedRows& all, int64_t row, int64_t rows,
                          int64_t begin, int64_t end) {
  const int32_t factor = preset_factor(f);
  for (int64_t i = row; i < row + rows; ++i) {
    const QuantizedRows out = row_of(f, all, i);
    for (int64_t k = begin; k < end; k += kSubBlock) {
      sums_of_16(out.codes + k, out.presets + k / kSubGroup);
    }
  }
  const int64_t units = f.act_group / kSubGroup;
  for (int64_t i = row; i < row + rows; ++i) {
    int32_t* presets = row_of(f, all, i).presets;
    int32_t* of_groups = presets + f.k_padded / kSubGroup;
    for (int64_t a = begin / f.act_group; a < end / f.act_group; ++a) {
      int32_t sum = 0;
      for (int64_t u = a * units; u < (a + 1) * units; ++u) {
        sum += presets[u];
        presets[u] = sub_preset(factor * presets[u]);
      }
      of_groups[a] = (kDot8Bias - 128) * sum;
    }
  }
}

/// Columns [begin, end) of a row: whole activation groups. Presets of sub16 come after, by
/// sub16_presets.
template <class Row>
SLMOPS_INLINE void quantize_span(const Format& f, const Row& row, int64_t begin, int64_t end,
                                 const QuantizedRows& out) {
  const bool sub16 = f.scale_kind == ScaleKind::sub16;
  const int64_t unit = sub16 ? f.act_group : preset_unit(f);
  const int32_t factor = preset_factor(f);
  float* scale = out.scale + begin / f.act_group;
  int32_t* preset = out.presets + begin / unit;
  for (int64_t group = begin; group < end; group += f.act_group, ++scale) {
    const int32_t amax_bits = largest_bits(row, group, group + f.act_group);
    float amax;
    memcpy(&amax, &amax_bits, sizeof(amax));
    const bool zero = amax_bits < kTinyBits || amax_bits >= kInfinityBits;
    *scale = amax_bits >= kInfinityBits ? kNan : zero ? 0.0f : amax / 127.0f;
    if (zero) memset(out.codes + group, 0, static_cast<size_t>(f.act_group));
    const F32 r = splat(127.0f / amax);
    for (int64_t k = group; k < group + f.act_group; k += unit) {
      const int32_t sum = zero ? 0 : round_columns(row, k, k + unit, r, out.codes);
      if (!sub16) *preset++ = factor * sum;
    }
  }
}

inline void quantize_rows(const Format& f, const SourceRows& src, const QuantizedRows& out,
                          int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    with_row(src, i, f.k, f.k_padded,
             [&](const auto& row) { quantize_span(f, row, 0, f.k_padded, row_of(f, out, i)); });
  }
  if (f.scale_kind == ScaleKind::sub16) sub16_presets(f, out, begin, end - begin, 0, f.k_padded);
  if constexpr (kBlocks) fill_code_blocks<Block>(f, out, begin, end - begin, 0, f.k_padded);
}

inline void widen_rows(const Format& f, const SourceRows& src, float* out, int64_t begin,
                       int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    with_row(src, i, f.k, f.k_padded, [&](const auto& row) {
      for (int64_t k = 0; k < f.k_padded; k += kLanes) store(out + i * f.k_padded + k, row(k));
    });
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
