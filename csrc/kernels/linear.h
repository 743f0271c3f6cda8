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

template <int kRows, int kLines>
using Accumulators = F32[kRows][kLines];

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
  Line u[kLines][4];
  I32 sub[kLines];
#pragma GCC unroll 2
  for (int l = 0; l < kLines; ++l) {
    const uint8_t* lines = block + j * 4 * kLineBytes + (half + l) * kLineBytes;
    const Line first = load_line(lines), second = load_line(lines + 2 * kLineBytes);
    u[l][0] = low_nibbles(first);
    u[l][1] = high_nibbles(first);
    u[l][2] = low_nibbles(second);
    u[l][3] = high_nibbles(second);
    sub[l] = sub_scales(block + 16 * kLineBytes + (half + l) * 32, j);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) {
      Dot4 dot = sub_begin(presets[r * preset_stride]);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) dot = dot4(dot, u[l][q], codes + r * stride + 4 * q);
      sum[r][l] = sub_end(sum[r][l], dot, sub[l]);
    }
  }
}

template <int kRows, int kLines>
SLMOPS_INLINE void add_scaled(const I32 (&sum)[kRows][kLines], const float* scale, int64_t stride,
                              Accumulators<kRows, kLines>& acc) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const F32 s = splat(scale[r * stride]);
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) acc[r][l] = fma(to_f32(sum[r][l]), s, acc[r][l]);
  }
}

/// acc of a `group` tile: for activation groups a, t = 0; for units in a, t = fma(I, s, t); acc =
/// fma(t, s_a, acc).
template <int kBits, ZeroKind kZero, int kRows, int kLines>
inline void group_block(const Format& f, const uint8_t* tile, int half, const BlockRows& rows,
                        Accumulators<kRows, kLines>& acc) {
  constexpr int64_t kLineK = kBits == 4 ? 8 : 4;
  const int64_t unit = preset_unit(f), units_per_act = f.act_group / unit,
                act_groups = f.k_padded / f.act_group;
  const int64_t units = f.k_padded / unit;
  const int64_t scale_offset = f.group / kLineK * 2 * kLineBytes;
  const uint8_t* group = tile + half * kLineBytes;
  int64_t in_group = 0;  // k of the current group already summed
  int64_t k = 0, u = 0;
  for (int64_t a = 0; a < act_groups; ++a) {
    F32 t[kRows][kLines];
    for (int r = 0; r < kRows; ++r) {
      for (int l = 0; l < kLines; ++l) t[r][l] = splat(0.0f);
    }
    for (int64_t i = 0; i < units_per_act; ++i, ++u) {
      const uint8_t* scales = group + scale_offset - half * (kLineBytes - 32);
      I32 sum[kRows][kLines];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int l = 0; l < kLines; ++l) {
          sum[r][l] =
              start_sums<kBits, kZero>(rows.presets[r * units + u], scales + kLineBytes + l * 32);
        }
      }
      const uint8_t* lines = group + in_group / kLineK * 2 * kLineBytes;
      for (const int64_t end = k + unit; k < end;) {
        if constexpr (kBits == 4) {
          add_int4<kRows, kLines>(lines, rows.codes + k, f.k_padded, sum);
          k += 32;
          lines += 8 * kLineBytes;
        } else {
          add_int8<kRows, kLines>(lines, rows.codes + k, f.k_padded, sum);
          k += 16;
          lines += 8 * kLineBytes;
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
            t[r][l] = fnma(splat(static_cast<float>(rows.presets[r * units + u])), shift, t[r][l]);
          }
        }
      }
      in_group += unit;
      if (in_group == f.group) {
        in_group = 0;
        group += f.group_bytes;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32 s = splat(rows.scale[r * act_groups + a]);
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) acc[r][l] = fma(t[r][l], s, acc[r][l]);
    }
  }
}

/// acc of a sub16 tile, before the outputs' own scales: acc = fma(I, s_a, acc). An activation group
/// is whole 64-k blocks or, where it is 32 long, half a one.
template <bool kWholeBlocks, int kRows, int kLines>
inline void sub16_block(const Format& f, const uint8_t* block, int half, const BlockRows& rows,
                        Accumulators<kRows, kLines>& acc) {
  constexpr int kChunks = kWholeBlocks ? 4 : 2;
  const int64_t stride = presets_per_row(f), act_groups = f.k_padded / f.act_group;
  const int64_t steps = kWholeBlocks ? f.act_group / kSubBlock : 1;
  const int8_t* codes = rows.codes;
  const int32_t* presets = rows.presets;
  for (int64_t a = 0; a < act_groups; ++a) {
    const int first = kWholeBlocks ? 0 : static_cast<int>(a % 2) * 2;
    I32 sum[kRows][kLines];
    for (int r = 0; r < kRows; ++r) {
      for (int l = 0; l < kLines; ++l) sum[r][l] = splat_i32(0);
    }
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kChunks; ++j) {
        add_sub16<kRows, kLines>(block, first + j, half, codes + j * kSubGroup, f.k_padded,
                                 presets + j, stride, sum);
      }
      codes += kChunks * kSubGroup;
      presets += kChunks;
      if (first + kChunks == 4) block += kSubBlockBytes;
    }
    add_scaled<kRows, kLines>(sum, rows.scale + a, act_groups, acc);
  }
}

/// The same from a tile expanded to int8 lines.
template <int kRows, int kLines>
inline void expanded_block(const Format& f, const uint8_t* tile, int half, const BlockRows& rows,
                           Accumulators<kRows, kLines>& acc) {
  const int64_t stride = presets_per_row(f), act_groups = f.k_padded / f.act_group;
  const int32_t* presets = rows.presets + f.k_padded / kSubGroup;
  const uint8_t* lines = tile + half * kLineBytes;
  for (int64_t a = 0, k = 0; a < act_groups; ++a) {
    I32 sum[kRows][kLines];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) sum[r][l] = splat_i32(presets[r * stride + a]);
    }
    for (const int64_t end = k + f.act_group; k < end; k += 16, lines += 8 * kLineBytes) {
      add_int8<kRows, kLines>(lines, rows.codes + k, f.k_padded, sum);
    }
    add_scaled<kRows, kLines>(sum, rows.scale + a, act_groups, acc);
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
template <int kRows, int kLines>
inline void finish_block(const LinearArgs& args, const uint8_t* tile, int64_t first_output,
                         int half, int64_t row, const Accumulators<kRows, kLines>& acc) {
  const Format& f = *args.format;
  for (int l = 0; l < kLines; ++l) {
    const int64_t n = first_output + (half + l) * kLanes;
    const int64_t count = f.n - n < kLanes ? f.n - n : kLanes;
    if (count <= 0) return;
    F32 own = splat(1.0f), bias = splat(0.0f);
    if (f.scale_kind == ScaleKind::sub16) {
      const uint8_t* s = tile + f.k_padded / kSubBlock * kSubBlockBytes + (half + l) * 64;
      own = load(reinterpret_cast<const float*>(s));
    }
    if (args.bias != nullptr) {
      bias = count == kLanes ? load_as(args.bias_type, args.bias, n)
                             : load_tail(args.bias_type, args.bias, n, count);
    }
    for (int r = 0; r < kRows; ++r) {
      F32 y = acc[r][l];
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

/// Calls block(acc, half, row) for all blocks of a tile, and finishes each.
template <class Block>
SLMOPS_INLINE void for_blocks(const LinearArgs& args, const uint8_t* tile, int64_t first_output,
                              int64_t row_begin, int64_t row_end, const Block& block) {
  for (int half = 0; half < 2; half += kBlockLines) {
    if (first_output + half * kLanes >= args.format->n) return;
    for (int64_t row = row_begin; row < row_end; row += kMaxRows) {
      with_constant<kMaxRows>(row_end - row < kMaxRows ? row_end - row : kMaxRows, [&](auto rows) {
        Accumulators<decltype(rows)::value, kBlockLines> acc;
        for (auto& lines : acc) {
          for (F32& x : lines) x = splat(0.0f);
        }
        block(acc, half, row);
        finish_block(args, tile, first_output, half, row, acc);
      });
    }
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
  for_blocks(args, tile, first_output, row_begin, row_end, [&](auto& acc, int half, int64_t row) {
    constexpr int kRows = sizeof(acc) / sizeof(acc[0]);
    group_block<kBits, kZero, kRows, kBlockLines>(*args.format, tile, half, rows_from(args, row),
                                                  acc);
  });
}

inline void linear_sub16(const LinearArgs& args, const uint8_t* tile, int64_t first_output,
                         int64_t row_begin, int64_t row_end) {
  // From two blocks of rows on, expanding once is cheaper than scaling in every block.
  const bool expanded = kExpandSub16 && row_end - row_begin > kMaxRows;
  if (expanded) expand_tile(*args.format, tile, args.scratch);
  for_blocks(args, tile, first_output, row_begin, row_end, [&](auto& acc, int half, int64_t row) {
    constexpr int kRows = sizeof(acc) / sizeof(acc[0]);
    const BlockRows rows = rows_from(args, row);
    if (expanded) {
      expanded_block<kRows, kBlockLines>(*args.format, args.scratch, half, rows, acc);
    } else if (args.format->act_group >= kSubBlock) {
      sub16_block<true, kRows, kBlockLines>(*args.format, tile, half, rows, acc);
    } else {
      sub16_block<false, kRows, kBlockLines>(*args.format, tile, half, rows, acc);
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
