// out[m][n] = act_scale * sum over k of code[m][k] * (u[n][k] - z) * s, in the order of
// docs/arithmetic.md.
//
// A block is kRows rows x kLines * 16 outputs of a tile; lanes are outputs, k is walked once,
// upwards, so a result depends on nothing but its own row and output. The integer sums are exact,
// so any row may form them as it likes.
#pragma once
#include "common.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// The rows of a block, each pointer at its first row.
struct BlockRows {
  const int8_t* codes;     // [kRows][k_padded]
  const float* scale;      // [kRows][k_padded / act_group]
  const int32_t* presets;  // [kRows][presets_per_row]
};

/// fp32 sums of a block: kRows rows x the two halves of a tile.
template <int kRows>
using TileSums = F32[kRows][2];

/// Halves of a tile that a pass over an activation group keeps in registers; the other half's
/// lines, between those of this one, are then still in the first-level cache.
template <int kRows>
constexpr int kPassLines = kRows <= kWideRows ? 2 : 1;

/// What a unit's integer sums start from, so that they end as sum of code * (u - z), or code * u
/// for a float z.
template <int kBits, ZeroKind kZero>
SLMOPS_INLINE I32 start_sums(int32_t preset, const uint8_t* zero_points) {
  constexpr int32_t kBias = kBits == 8 ? kDot8Bias : 0;
  if constexpr (kZero == ZeroKind::none) return splat_i32(preset);
  if constexpr (kZero == ZeroKind::int16) {
    return (load_i16(zero_points) + splat_i32(-kBias)) * splat_i32(preset);
  }
  return splat_i32(kBias * preset);
}

/// Adds 32 k of int4 lines to the sums.
template <int kRows, int kLines>
SLMOPS_INLINE void add_int4(const uint8_t* lines, const int8_t* codes, int64_t stride,
                            I32 (&sum)[kRows][kLines]) {
  Dot4 dot[kRows][kLines];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) dot[r][l] = dot4_begin(sum[r][l]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    Line low[kLines], high[kLines];
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) {
      const Line line = load_line(lines + j * 2 * kLineBytes + l * kLineBytes);
      low[l] = low_nibbles(line);
      high[l] = high_nibbles(line);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        dot[r][l] = dot4(dot[r][l], low[l], codes + r * stride + 8 * j);
        dot[r][l] = dot4(dot[r][l], high[l], codes + r * stride + 8 * j + 4);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) sum[r][l] = dot4_end(sum[r][l], dot[r][l]);
  }
}

/// Adds 16 k of int8 lines to the sums.
template <int kRows, int kLines>
SLMOPS_INLINE void add_int8(const uint8_t* lines, const int8_t* codes, int64_t stride,
                            I32 (&sum)[kRows][kLines]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    Bytes u[kLines];
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l)
      u[l] = bytes(load_line(lines + j * 2 * kLineBytes + l * kLineBytes));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l)
        sum[r][l] = dot8(sum[r][l], u[l], codes + r * stride + 4 * j);
    }
  }
}

/// Adds 16 k of sub16 lines, scaled by group j's sub-scales, to the sums.
template <int kRows, int kLines>
SLMOPS_INLINE void add_sub16(const uint8_t* block, int j, int half, const int8_t* codes,
                             int64_t stride, const int32_t* presets, int64_t preset_stride,
                             I32 (&sum)[kRows][kLines]) {
  // A line at a time: four of them unpacked are half of the registers of AVX2.
#pragma GCC unroll 2
  for (int l = 0; l < kLines; ++l) {
    const uint8_t* lines = block + j * 4 * kLineBytes + (half + l) * kLineBytes;
    const Line first = load_line(lines), second = load_line(lines + 2 * kLineBytes);
    const Line u[4] = {low_nibbles(first), high_nibbles(first), low_nibbles(second),
                       high_nibbles(second)};
    const I32 sub = sub_scales(block + 16 * kLineBytes + (half + l) * 32, j);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Dot4 dot = sub_begin(presets[r * preset_stride]);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) dot = dot4(dot, u[q], codes + r * stride + 4 * q);
      sum[r][l] = sub_end(sum[r][l], dot, sub);
    }
  }
}

/// acc[r][half + l] = fma(term, scale of row r, acc) for a pass over kLines of a tile's two halves.
template <int kRows, int kLines>
SLMOPS_INLINE void add_scaled(const F32 (&term)[kRows][kLines], const float* scale, int64_t stride,
                              int half, TileSums<kRows>& acc) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const F32 s = splat(scale[r * stride]);
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) acc[r][half + l] = fma(term[r][l], s, acc[r][half + l]);
  }
}

template <int kRows, int kLines>
SLMOPS_INLINE void add_scaled(const I32 (&sum)[kRows][kLines], const float* scale, int64_t stride,
                              int half, TileSums<kRows>& acc) {
  F32 term[kRows][kLines];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) term[r][l] = to_f32(sum[r][l]);
  }
  add_scaled<kRows, kLines>(term, scale, stride, half, acc);
}

/// t of an activation group: t = 0; for its units t = fma(I, s, t). `group` is the weight group
/// that the activation group starts in, `in_group` how far; codes and presets are those of its
/// first k.
template <int kBits, ZeroKind kZero, int kRows, int kLines>
SLMOPS_INLINE void group_terms(const Format& f, const uint8_t* group, int64_t in_group, int half,
                               const int8_t* codes, const int32_t* presets,
                               F32 (&t)[kRows][kLines]) {
  constexpr int64_t kLineK = kBits == 4 ? 8 : 4;
  const int64_t unit = preset_unit(f), units = f.k_padded / unit;
  const int64_t scale_offset = f.group / kLineK * 2 * kLineBytes + half * 32;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) t[r][l] = splat(0.0f);
  }
  for (int64_t done = 0; done < f.act_group; done += unit, ++presets) {
    const uint8_t* scales = group + scale_offset;
    const uint8_t* lines = group + in_group / kLineK * 2 * kLineBytes + half * kLineBytes;
    I32 sum[kRows][kLines];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        sum[r][l] = start_sums<kBits, kZero>(presets[r * units], scales + kLineBytes + l * 32);
      }
    }
    for (const int8_t* end = codes + unit; codes < end; lines += 8 * kLineBytes) {
      if constexpr (kBits == 4) {
        add_int4<kRows, kLines>(lines, codes, f.k_padded, sum);
        codes += 32;
      } else {
        add_int8<kRows, kLines>(lines, codes, f.k_padded, sum);
        codes += 16;
      }
    }
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) {
      const F32 s = load_scale(f.scale_type, scales + l * 32);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) t[r][l] = fma(to_f32(sum[r][l]), s, t[r][l]);
      if constexpr (kZero == ZeroKind::floating) {
        const F32 shift = s * load_scale(f.scale_type, scales + kLineBytes + l * 32);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          t[r][l] = fnma(splat(static_cast<float>(presets[r * units])), shift, t[r][l]);
        }
      }
    }
    in_group += unit;
    if (in_group == f.group) {
      in_group = 0;
      group += f.group_bytes;
    }
  }
}

/// acc of a `group` tile: for activation groups a, acc = fma(t, s_a, acc).
template <int kBits, ZeroKind kZero, int kRows>
inline void group_block(const Format& f, const uint8_t* tile, const BlockRows& rows,
                        TileSums<kRows>& acc) {
  constexpr int kLines = kPassLines<kRows>;
  const int64_t act_groups = f.k_padded / f.act_group;
  const int64_t units_per_act = f.act_group / preset_unit(f);
  for (int64_t a = 0; a < act_groups; ++a) {
    const int64_t k = a * f.act_group;
    for (int half = 0; half < 2; half += kLines) {
      F32 t[kRows][kLines];
      group_terms<kBits, kZero, kRows, kLines>(f, tile + k / f.group * f.group_bytes, k % f.group,
                                               half, rows.codes + k,
                                               rows.presets + a * units_per_act, t);
      add_scaled<kRows, kLines>(t, rows.scale + a, act_groups, half, acc);
    }
  }
}

/// acc of a sub16 tile, before the outputs' own scales: acc = fma(I, s_a, acc). An activation group
/// is whole 64-k blocks or, where it is 32 long, half a one.
template <bool kWholeBlocks, int kRows>
inline void sub16_block(const Format& f, const uint8_t* tile, const BlockRows& rows,
                        TileSums<kRows>& acc) {
  constexpr int kLines = kPassLines<kRows>;
  constexpr int kChunks = kWholeBlocks ? 4 : 2;
  const int64_t stride = presets_per_row(f), act_groups = f.k_padded / f.act_group;
  for (int64_t a = 0; a < act_groups; ++a) {
    const int first = kWholeBlocks ? 0 : static_cast<int>(a % 2) * 2;
    for (int half = 0; half < 2; half += kLines) {
      const uint8_t* block = tile + a * f.act_group / kSubBlock * kSubBlockBytes;
      const int8_t* codes = rows.codes + a * f.act_group;
      const int32_t* presets = rows.presets + a * f.act_group / kSubGroup;
      I32 sum[kRows][kLines];
      for (int r = 0; r < kRows; ++r) {
        for (int l = 0; l < kLines; ++l) sum[r][l] = splat_i32(0);
      }
      for (const int8_t* end = codes + f.act_group; codes < end; codes += kChunks * kSubGroup) {
#pragma GCC unroll 4
        for (int j = 0; j < kChunks; ++j) {
          add_sub16<kRows, kLines>(block, first + j, half, codes + j * kSubGroup, f.k_padded,
                                   presets + j, stride, sum);
        }
        presets += kChunks;
        block += kSubBlockBytes;
      }
      add_scaled<kRows, kLines>(sum, rows.scale + a, act_groups, half, acc);
    }
  }
}

/// The same from a tile expanded to int8 lines.
template <int kRows>
inline void expanded_block(const Format& f, const uint8_t* tile, const BlockRows& rows,
                           TileSums<kRows>& acc) {
  constexpr int kLines = kPassLines<kRows>;
  const int64_t stride = presets_per_row(f), act_groups = f.k_padded / f.act_group;
  const int32_t* presets = rows.presets + f.k_padded / kSubGroup;
  for (int64_t a = 0; a < act_groups; ++a) {
    for (int half = 0; half < 2; half += kLines) {
      const uint8_t* lines = tile + a * f.act_group * kTile + half * kLineBytes;
      const int8_t* codes = rows.codes + a * f.act_group;
      I32 sum[kRows][kLines];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int l = 0; l < kLines; ++l) sum[r][l] = splat_i32(presets[r * stride + a]);
      }
      for (const int8_t* end = codes + f.act_group; codes < end; codes += 16) {
        add_int8<kRows, kLines>(lines, codes, f.k_padded, sum);
        lines += 8 * kLineBytes;
      }
      add_scaled<kRows, kLines>(sum, rows.scale + a, act_groups, half, acc);
    }
  }
}

/// A sub16 tile as int8 lines of u = v + 128.
inline void expand_tile(const Format& f, const uint8_t* tile, uint8_t* out) {
  for (int64_t k = 0; k < f.k_padded; k += kSubBlock, tile += kSubBlockBytes) {
    for (int j = 0; j < 8; ++j, out += 4 * kLineBytes) {
      for (int half = 0; half < 2; ++half) {
        const I32 sub = sub_scales(tile + 16 * kLineBytes + half * 32, j / 2);
        const Line line = load_line(tile + (2 * j + half) * kLineBytes);
        store_line(out + half * kLineBytes, expand(low_nibbles(line), sub));
        store_line(out + (2 + half) * kLineBytes, expand(high_nibbles(line), sub));
      }
    }
  }
}

/// Own scales of sub16 outputs, bias, the one rounding to the output's type.
template <int kRows>
inline void finish_block(const LinearArgs& args, const uint8_t* tile, int64_t first_output,
                         int64_t row, const TileSums<kRows>& acc) {
  const Format& f = *args.format;
  for (int half = 0; half < 2; ++half) {
    const int64_t n = first_output + half * kLanes;
    const int64_t count = f.n - n < kLanes ? f.n - n : kLanes;
    if (count <= 0) return;
    F32 own = splat(1.0f), bias = splat(0.0f);
    if (f.scale_kind == ScaleKind::sub16) {
      const uint8_t* s = tile + f.k_padded / kSubBlock * kSubBlockBytes + half * 64;
      own = load(reinterpret_cast<const float*>(s));
    }
    if (args.bias != nullptr) {
      bias = count == kLanes ? load_as(args.bias_type, args.bias, n)
                             : load_tail(args.bias_type, args.bias, n, count);
    }
    for (int r = 0; r < kRows; ++r) {
      F32 y = acc[r][half];
      if (f.scale_kind == ScaleKind::sub16) y = y * own;
      if (args.bias != nullptr) y = y + bias;
      const int64_t at = (row + r) * args.out_stride + n;
      if (count == kLanes) {
        store_as(args.out_type, args.out, at, y);
      } else {
        store_tail(args.out_type, args.out, at, y, count);
      }
    }
  }
}

/// Calls block(acc, row) for all blocks of a tile, and finishes each.
template <class Block>
SLMOPS_INLINE void for_blocks(const LinearArgs& args, const uint8_t* tile, int64_t first_output,
                              int64_t row_begin, int64_t row_end, const Block& block) {
  for (int64_t row = row_begin; row < row_end; row += kMaxRows) {
    with_constant<kMaxRows>(row_end - row < kMaxRows ? row_end - row : kMaxRows, [&](auto rows) {
      constexpr int kRows = decltype(rows)::value;
      TileSums<kRows> acc;
      for (auto& halves : acc) halves[0] = halves[1] = splat(0.0f);
      block(rows, acc, row);
      finish_block<kRows>(args, tile, first_output, row, acc);
    });
  }
}

inline BlockRows rows_from(const LinearArgs& args, int64_t row) {
  const Format& f = *args.format;
  return {args.rows.codes + row * f.k_padded, args.rows.scale + row * (f.k_padded / f.act_group),
          args.rows.presets + row * presets_per_row(f)};
}

template <int kBits, ZeroKind kZero>
inline void linear_group(const LinearArgs& args, const uint8_t* tile, int64_t first_output,
                         int64_t row_begin, int64_t row_end) {
  for_blocks(args, tile, first_output, row_begin, row_end, [&](auto rows, auto& acc, int64_t row) {
    constexpr int kRows = decltype(rows)::value;
    group_block<kBits, kZero, kRows>(*args.format, tile, rows_from(args, row), acc);
  });
}

inline void linear_sub16(const LinearArgs& args, const uint8_t* tile, int64_t first_output,
                         int64_t row_begin, int64_t row_end) {
  // From two blocks of rows on, expanding once is cheaper than scaling in every block.
  const bool expanded = kExpandSub16 && row_end - row_begin > kMaxRows;
  if (expanded) expand_tile(*args.format, tile, args.scratch);
  for_blocks(args, tile, first_output, row_begin, row_end, [&](auto rows, auto& acc, int64_t row) {
    constexpr int kRows = decltype(rows)::value;
    const BlockRows block_rows = rows_from(args, row);
    if (expanded) {
      expanded_block<kRows>(*args.format, args.scratch, block_rows, acc);
    } else if (args.format->act_group >= kSubBlock) {
      sub16_block<true, kRows>(*args.format, tile, block_rows, acc);
    } else {
      sub16_block<false, kRows>(*args.format, tile, block_rows, acc);
    }
  });
}

template <int kBits>
inline void linear_bits(const LinearArgs& args, const uint8_t* tile, int64_t first_output,
                        int64_t begin, int64_t end) {
  switch (args.format->zero_kind) {
    case ZeroKind::none:
      return linear_group<kBits, ZeroKind::none>(args, tile, first_output, begin, end);
    case ZeroKind::int16:
      return linear_group<kBits, ZeroKind::int16>(args, tile, first_output, begin, end);
    case ZeroKind::floating:
      return linear_group<kBits, ZeroKind::floating>(args, tile, first_output, begin, end);
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
