// Passes of linear, activations="int8": kRows rows over a chunk of a tile, for each weight format.
//
// acc[r][l] are the fp32 sums of row r and output lane of half + l; k ascends, in the order of
// docs/arithmetic.md.
#pragma once
#include "linear_dots.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// Part of a tile: whole activation groups and scale blocks of k, and the tile's bytes for them.
struct Chunk {
  const uint8_t* lines;
  int64_t count;  // of k
};

/// k of the shortest unit of `group` formats; others have a multiple.
constexpr int64_t kShortUnit = 32;

/// Rows of a pass, each pointer at its first row and the chunk's first k.
struct PassRows {
  const int8_t* codes;
  int64_t code_stride;
  const float* scale;
  int64_t scale_stride;
  const int32_t* presets;
  int64_t preset_stride, presets_per_act;
};

/// acc = fma(term, scale of the row, acc).
template <int kRows, int kLines>
SLMOPS_INLINE void add_scaled(const F32 (&term)[kRows][kLines], const float* scale, int64_t stride,
                              F32 (&acc)[kRows][kLines]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const F32 s = splat(scale[r * stride]);
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) acc[r][l] = fma(term[r][l], s, acc[r][l]);
  }
}

template <int kRows, int kLines>
SLMOPS_INLINE void add_scaled(const I32 (&sum)[kRows][kLines], const float* scale, int64_t stride,
                              F32 (&acc)[kRows][kLines]) {
  F32 term[kRows][kLines];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) term[r][l] = to_f32(sum[r][l]);
  }
  add_scaled<kRows, kLines>(term, scale, stride, acc);
}

/// Where in the weight groups of a tile a pass is.
struct GroupWalk {
  const uint8_t* group;
  int64_t in_group;  // k of the group behind it
  int64_t k;         // of the chunk behind it

  template <int kBits>
  SLMOPS_INLINE const uint8_t* lines() const {
    return group + in_group * (kTile * kBits / 8);
  }
  SLMOPS_INLINE void advance(const Format& f, int64_t unit) {
    k += unit;
    in_group += unit;
    if (in_group == f.group) {
      in_group = 0;
      group += f.group_bytes;
    }
  }
};

/// k of the lines that are added at a time.
template <int kBits>
constexpr int64_t kLinesK = kBits == 4 ? 32 : 16;

/// The integer dots of a unit, `k` of the chunk behind it, are added to `sum`, in kSums of which
/// their quads take turns. Passes call it for units in order; all have kUnit k, unless that is 0,
/// and each, if kAlone, is an activation group.
template <int kBits, class A, int kSums = 1, int64_t kUnit = 0, bool kAlone = false>
struct LineDots {
  static constexpr int64_t unit = kUnit;
  static constexpr bool alone = kAlone;
  const int8_t* codes;
  int64_t stride;
  A ask;

  template <int kRows, int kLines>
  SLMOPS_INLINE void add(const uint8_t* lines, int half, int64_t k, int64_t count,
                         I32 (&sum)[kRows][kLines]) {
    I32 sums[kSums][kRows][kLines];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        sums[0][r][l] = sum[r][l];
        if constexpr (kSums == 2) sums[1][r][l] = splat_i32(0);
      }
    }
    lines += half * kLineBytes;
    const int8_t* at = codes + k;
    if constexpr (kUnit != 0) {
#pragma GCC unroll 2
      for (int64_t i = 0; i < kUnit; i += kLinesK<kBits>) {
        add_lines(lines + i / kLinesK<kBits> * 8 * kLineBytes, at + i, sums);
      }
    } else {
      for (const int8_t* end = at + count; at < end;
           at += kLinesK<kBits>, lines += 8 * kLineBytes) {
        add_lines(lines, at, sums);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        sum[r][l] = sums[0][r][l];
        if constexpr (kSums == 2) sum[r][l] = sum[r][l] + sums[1][r][l];
      }
    }
  }

 private:
  template <int kRows, int kLines>
  SLMOPS_INLINE void add_lines(const uint8_t* lines, const int8_t* at,
                               I32 (&sums)[kSums][kRows][kLines]) {
    ask.more();
    if constexpr (kBits == 4) return add_int4(lines, at, stride, sums);
    add_int8(lines, at, stride, sums);
  }
};

/// t of an activation group, which the walk is moved past: t = 0; for its units t = fma(I, s, t),
/// and for those of a float z or an offset m t = fma(sum of codes, -(s * z) or m, t).
/// Presets are those of its first unit.
template <int kBits, ZeroKind kZero, class Dots, int kRows, int kLines>
SLMOPS_INLINE void group_terms(const Format& f, GroupWalk* walk, int half, Dots& dots,
                               const int32_t* presets, int64_t preset_stride,
                               F32 (&t)[kRows][kLines]) {
  constexpr int64_t kLineK = kBits == 4 ? 8 : 4;
  const int64_t unit = Dots::unit != 0 ? Dots::unit : preset_unit(f);
  const int64_t scale_offset = f.group / kLineK * 2 * kLineBytes + half * 32;
  const bool small = has_small_sums(unit);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) t[r][l] = splat(0.0f);
  }
  const int64_t act_group = Dots::alone ? unit : f.act_group;
  for (int64_t done = 0; done < act_group; done += unit, ++presets) {
    const uint8_t* scales = walk->group + scale_offset;
    I32 sum[kRows][kLines];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        sum[r][l] = start_sums<kBits, kZero>(presets[r * preset_stride],
                                             scales + kLineBytes + l * 32, small ? kSumBias : 0);
      }
    }
    dots.add(walk->lines<kBits>(), half, walk->k, unit, sum);
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) {
      const F32 s = load_scale(f.scale_type, scales + l * 32);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        t[r][l] = fma(small ? small_to_f32(sum[r][l]) : to_f32(sum[r][l]), s, t[r][l]);
      }
      if constexpr (kZero == ZeroKind::floating) {
        const F32 zero = load_scale(f.scale_type, scales + kLineBytes + l * 32);
        const F32 shift = f.zero_kind == ZeroKind::offset ? negate(zero) : s * zero;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const float code_sum = static_cast<float>(presets[r * preset_stride]);
          t[r][l] = fnma(splat(code_sum), shift, t[r][l]);
        }
      }
    }
    walk->advance(f, unit);
  }
}

/// `group` lines from `walk` to k == end: for activation groups a, acc = fma(t, s_a, acc).
template <int kBits, ZeroKind kZero, class Dots, int kRows, int kLines>
SLMOPS_INLINE void group_pass(const Format& f, GroupWalk walk, int64_t end, int half, Dots dots,
                              const PassRows& rows, F32 (&acc)[kRows][kLines]) {
  const int32_t* presets = rows.presets;
  const float* scale = rows.scale;
  while (walk.k < end) {
    F32 t[kRows][kLines];
    group_terms<kBits, kZero>(f, &walk, half, dots, presets, rows.preset_stride, t);
    presets += rows.presets_per_act;
    add_scaled<kRows, kLines>(t, scale++, rows.scale_stride, acc);
  }
}

/// sub16 lines, before the outputs' own scales: acc = fma(I, s_a, acc). An activation group is
/// whole 64-k blocks or, where it is 32 long, half a one.
template <bool kWholeBlocks, class A, int kRows, int kLines>
SLMOPS_INLINE void sub16_pass(const Format& f, const Chunk& chunk, int half, const PassRows& rows,
                              A ask, F32 (&acc)[kRows][kLines]) {
  constexpr int kGroups = kWholeBlocks ? 4 : 2;
  const int8_t* codes = rows.codes;
  const int32_t* presets = rows.presets;
  const uint8_t* block = chunk.lines;
  const float* scale = rows.scale;
  int first = 0;  // group of the block
  for (const int8_t* last = codes + chunk.count; codes < last;) {
    I32 sum[kRows][kLines];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) sum[r][l] = splat_i32(0);
    }
    for (const int8_t* end = codes + f.act_group; codes < end; codes += kGroups * kSubGroup) {
      if constexpr (kWholeBlocks && kRows <= kSubBlockRows) {
        add_sub16_block<kRows, kLines>(block, half, codes, rows.code_stride, presets,
                                       rows.preset_stride, ask, sum);
      } else {
#pragma GCC unroll 4
        for (int j = 0; j < kGroups; ++j) {
          ask.more();
          add_sub16<kRows, kLines>(block, first + j, half, codes + j * kSubGroup, rows.code_stride,
                                   presets + j, rows.preset_stride, sum);
        }
      }
      presets += kGroups;
      first = (first + kGroups) % 4;
      if (first == 0) block += kSubBlockBytes;
    }
    add_scaled<kRows, kLines>(sum, scale++, rows.scale_stride, acc);
  }
}

/// The same from lines that expand_chunk made; presets are those per activation group.
template <class Dots, int kRows, int kLines>
SLMOPS_INLINE void expanded_pass(const Format& f, const Chunk& chunk, int half, Dots dots,
                                 const PassRows& rows, F32 (&acc)[kRows][kLines]) {
  const int32_t* presets = rows.presets;
  const float* scale = rows.scale;
  for (int64_t k = 0; k < chunk.count; k += f.act_group, ++presets) {
    I32 sum[kRows][kLines];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        sum[r][l] = splat_i32(presets[r * rows.preset_stride]);
      }
    }
    dots.add(chunk.lines + k * kTile, half, k, f.act_group, sum);
    add_scaled<kRows, kLines>(sum, scale++, rows.scale_stride, acc);
  }
}

/// Stores 8 k of 16 outputs as two lines.
SLMOPS_INLINE void store_lines(uint8_t* out, int half, Line low, Line high) {
  store_line(out + half * kLineBytes, low);
  store_line(out + (2 + half) * kLineBytes, high);
}

/// sub16 lines as int8 lines of u = v + 128: store(out, half, k 0..3, k 4..7) for 8 k at a time,
/// which take 4 lines of `out`.
template <class Store>
SLMOPS_INLINE void expand_chunk(const Chunk& chunk, uint8_t* out, const Store& store) {
  const uint8_t* block = chunk.lines;
  for (int64_t k = 0; k < chunk.count; k += kSubBlock, block += kSubBlockBytes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, out += 8 * kLineBytes) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const I32 sub = sub_scales(block + 16 * kLineBytes + half * 32, j);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const Line line = load_line(block + (4 * j + 2 * i + half) * kLineBytes);
          store(out + 4 * i * kLineBytes, half, expand(low_nibbles(line), sub),
                expand(high_nibbles(line), sub));
        }
      }
    }
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
