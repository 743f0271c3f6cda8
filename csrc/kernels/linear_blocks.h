// Steps of linear on blocks of 8 rows x 4 outputs, for instruction sets of narrow registers: their
// integer and fp32 sums stay in registers while a chunk passes, whose weights were expanded once
// for all rows.
//
// What `Block` has of the SIMD contract stands in scalar.h. The integers are the same as those of
// linear_dots.h, and the order in which they are scaled and added is that of linear_passes.h.
#pragma once
#include "linear_steps.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr int kBlockLanes = 2 * kLanes;
/// k of a Block::add, and the bytes of its operands of 4 outputs, of those of all outputs, which
/// lie side by side, and of its codes.
constexpr int64_t kBlockK = 16, kQuarterBytes = 64, kBlockBytes = kTile / 4 * kQuarterBytes,
                  kBlockCodeBytes = kCodeRows * kBlockK;

/// Scratch of a step: a chunk's operands, its factors for each unit of k and 4
/// outputs, and what the 8 rows of a block bring to each of its units and activation groups.
struct BlockRoom {
  uint8_t* operands;
  int32_t* starts;  // of the sums
  float* row_scales;
  float* code_sums;  // of a float z or an offset
  float* scales;
  float* shifts;  // as floats, or zero points as int32

  BlockRoom(uint8_t* room, int64_t count) {
    const auto take = [&](int64_t bytes) {
      uint8_t* taken = room;
      room += bytes;
      return taken;
    };
    const int64_t units = count / 32, lanes = units * kBlockLanes * int64_t{sizeof(float)};
    const int64_t factors = units * kTile * 2 * int64_t{sizeof(float)};
    operands = take(count * kTile);
    starts = reinterpret_cast<int32_t*>(take(lanes));
    row_scales = reinterpret_cast<float*>(take(lanes));
    code_sums = reinterpret_cast<float*>(take(lanes));
    scales = reinterpret_cast<float*>(take(factors));
    shifts = reinterpret_cast<float*>(take(factors));
  }
};

/// Operands of a chunk of int4 or int8 lines of `group` formats.
template <class B, int kBits>
inline void group_operands(const Format& f, const Chunk& chunk, uint8_t* out) {
  const int64_t line_bytes = f.group * kTile * kBits / 8;
  const uint8_t* group = chunk.lines;
  for (int64_t k = 0; k < chunk.count; k += f.group, group += f.group_bytes) {
    for (const uint8_t* line = group; line < group + line_bytes; out += kBlockBytes) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const uint8_t* at = line + half * kLineBytes;
        uint8_t* to = out + half * 4 * kQuarterBytes;
        if constexpr (kBits == 4) {
          B::store_int4(to, load_line(at), load_line(at + 2 * kLineBytes));
        } else {
          B::store_int8(to, {load_line(at), load_line(at + 2 * kLineBytes),
                             load_line(at + 4 * kLineBytes), load_line(at + 6 * kLineBytes)});
        }
      }
      line += kBits * kLineBytes;
    }
  }
}

template <class B>
inline void sub16_operands(const Chunk& chunk, uint8_t* out) {
  const uint8_t* block = chunk.lines;
  for (int64_t k = 0; k < chunk.count; k += kSubBlock, block += kSubBlockBytes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, out += kBlockBytes) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const uint8_t* line = block + (4 * j + half) * kLineBytes;
        B::store_sub16(out + half * 4 * kQuarterBytes, load_line(line),
                       load_line(line + 2 * kLineBytes), block + 16 * kLineBytes + half * 32, j);
      }
    }
  }
}

/// Scales and zero points of a chunk's units.
template <class B, int kBits, ZeroKind kZero>
inline void group_factors(const Format& f, const Chunk& chunk, const BlockRoom& room) {
  const int64_t unit = preset_unit(f), line_bytes = f.group * kTile * kBits / 8;
  constexpr int64_t kStep = 4 * B::kFactors;  // floats of a unit and half
  float *scales = room.scales, *shifts = room.shifts;
  GroupWalk walk = {chunk.lines, 0, 0};
  for (; walk.k < chunk.count; walk.advance(f, unit)) {
    for (int half = 0; half < 2; ++half, scales += kStep, shifts += kStep) {
      const uint8_t* at = walk.group + line_bytes + half * 32;
      const F32 s = load_scale(f.scale_type, at);
      B::store_factors(scales, s);
      if constexpr (kZero == ZeroKind::int16) {
        B::store_factors(
            shifts, from_bits(load_i16(at + kLineBytes) + splat_i32(kBits == 8 ? -kDot8Bias : 0)));
      } else if constexpr (kZero == ZeroKind::floating) {
        const F32 zero = load_scale(f.scale_type, at + kLineBytes);
        B::store_factors(shifts, f.zero_kind == ZeroKind::offset ? negate(zero) : s * zero);
      }
    }
  }
}

/// A block's row, or where it is missing the last of those present.
constexpr int64_t block_row(int row, int64_t present) { return row < present ? row : present - 1; }

/// Spreads `count` words of a block's rows: convert(word) of the rows' first words at `in`,
/// `stride` words apart; four at a time, which `convert` is given as a vector.
template <class B, class Word, class Convert>
inline void spread_rows(const Word* in, int64_t stride, int64_t count, int64_t present, Word* out,
                        const Convert& convert) {
  for (int pair = 0; pair < kCodeRows / 2; ++pair) {
    const Word *x = in + block_row(2 * pair, present) * stride,
               *y = in + block_row(2 * pair + 1, present) * stride;
    Word* to = out;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4, to += 4 * kBlockLanes) {
      B::spread(to, pair, convert(B::load_four(x + i)), convert(B::load_four(y + i)));
    }
    for (; i < count; ++i, to += kBlockLanes) {
      B::spread(to, pair, __builtin_bit_cast(uint32_t, convert(x[i])),
                __builtin_bit_cast(uint32_t, convert(y[i])));
    }
  }
}

/// Scales of a block's rows, for `count` k.
template <class B>
inline void block_scales(const Format& f, const PassRows& rows, int64_t count, int64_t present,
                         const BlockRoom& room) {
  spread_rows<B>(rows.scale, rows.scale_stride, count / f.act_group, present, room.row_scales,
                 [](auto scale) { return scale; });
}

/// What the sums of a block's units start from.
template <class B, ZeroKind kZero, int32_t kDotBias>
inline void block_starts(const PassRows& rows, int64_t units, int64_t present, int32_t bias,
                         const BlockRoom& room) {
  spread_rows<B>(rows.presets, rows.preset_stride, units, present, room.starts, [&](auto preset) {
    if constexpr (kZero == ZeroKind::int16) return preset;
    if constexpr (kZero == ZeroKind::none) return preset + bias;
    return kDotBias * preset + bias;
  });
  if constexpr (kZero != ZeroKind::floating) return;
  for (int pair = 0; pair < kCodeRows / 2; ++pair) {
    const int32_t *x = rows.presets + block_row(2 * pair, present) * rows.preset_stride,
                  *y = rows.presets + block_row(2 * pair + 1, present) * rows.preset_stride;
    float* code_sums = room.code_sums;
    for (int64_t i = 0; i < units; ++i, code_sums += kBlockLanes) {
      B::spread(code_sums, pair, __builtin_bit_cast(uint32_t, static_cast<float>(x[i])),
                __builtin_bit_cast(uint32_t, static_cast<float>(y[i])));
    }
  }
}

/// The units of 4 outputs in order: their sums, and the operands and codes behind them.
template <class B>
struct BlockWalk {
  const uint8_t* operands;
  const int8_t* codes;
  const int32_t* starts;

  SLMOPS_INLINE void add(int64_t unit, I32 (&sum)[2]) {
    int64_t left = unit;
    do {
      B::add(sum, operands, codes);
      B::add(sum, operands + kBlockBytes, codes + kBlockCodeBytes);
      operands += 2 * kBlockBytes;
      codes += 2 * kBlockCodeBytes;
      left -= 2 * kBlockK;
    } while (left > 0);
    starts += kBlockLanes;
  }
};

template <bool kSmall>
SLMOPS_INLINE F32 sum_to_f32(I32 sum) {
  return kSmall ? small_to_f32(sum) : to_f32(sum);
}

/// The units of 4 outputs of a block, in order: t = fma(I, s, t), and for those of a float z or an
/// offset t = fma(sum of codes, -(s * z) or m, t).
template <class B, ZeroKind kZero, bool kSmall>
struct BlockTerms {
  BlockWalk<B> walk;
  const float *code_sums, *scales, *shifts;
  bool bounded;  // scales, so that their products with kSumBias are finite

  /// Moves past a unit; begins with t = 0 where kFirst.
  template <bool kFirst>
  SLMOPS_INLINE void add(int64_t unit, F32 (&t)[2]) {
    I32 sum[2] = {load_i32(walk.starts), load_i32(walk.starts + kLanes)};
    if constexpr (kZero == ZeroKind::int16) {
      const I32 z = bits_of(B::load_factors(shifts)), bias = splat_i32(kSmall ? kSumBias : 0);
      for (I32& s : sum) s = s * z + bias;
    }
    walk.add(unit, sum);
    const F32 s = B::load_factors(scales);
    if (kFirst && kSmall && bounded) {
      // (bias + I) * s - bias * s is exact but for the one rounding, and spares the conversion.
      const F32 shift = s * splat(-__builtin_bit_cast(float, kSumBias));
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) t[v] = fma(from_bits(sum[v]), s, shift);
    } else {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        t[v] = fma(sum_to_f32<kSmall>(sum[v]), s, kFirst ? splat(0.0f) : t[v]);
      }
    }
    if constexpr (kZero == ZeroKind::floating) {
      const F32 shift = B::load_factors(shifts);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) t[v] = fnma(load(code_sums + v * kLanes), shift, t[v]);
      code_sums += kBlockLanes;
    }
    scales += 8 * B::kFactors;
    shifts += 8 * B::kFactors;
  }
};

/// 4 outputs of a block on a chunk, from the sums at `out` on.
template <class B, ZeroKind kZero, bool kSmall>
SLMOPS_INLINE void group_block(const Format& f, int64_t count, int quarter, const BlockRoom& room,
                               const int8_t* codes, float* out) {
  const int64_t unit = preset_unit(f);
  const int64_t factors = quarter * B::kFactors;
  BlockTerms<B, kZero, kSmall> terms = {
      {room.operands + quarter * kQuarterBytes, codes, room.starts},
      room.code_sums,
      room.scales + factors,
      room.shifts + factors,
      f.scale_type == DType::f16};
  const float* row_scales = room.row_scales;
  F32 acc[2] = {B::load_sums(out, kTile), B::load_sums(out + 4 * kTile, kTile)};
  for (int64_t a = 0; a < count; a += f.act_group, row_scales += kBlockLanes) {
    F32 t[2];
    terms.template add<true>(unit, t);
    for (int64_t done = unit; done < f.act_group; done += unit) {
      terms.template add<false>(unit, t);
    }
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) acc[v] = fma(t[v], load(row_scales + v * kLanes), acc[v]);
  }
  B::store_sums(out, kTile, acc[0]);
  B::store_sums(out + 4 * kTile, kTile, acc[1]);
}

/// The same of expanded sub16 weights: a sum for each activation group.
template <class B, bool kSmall>
SLMOPS_INLINE void sub16_block(const Format& f, int64_t count, int quarter, const BlockRoom& room,
                               const int8_t* codes, float* out) {
  BlockWalk<B> walk = {room.operands + quarter * kQuarterBytes, codes, room.starts};
  const float* row_scales = room.row_scales;
  F32 acc[2] = {B::load_sums(out, kTile), B::load_sums(out + 4 * kTile, kTile)};
  for (int64_t a = 0; a < count; a += f.act_group, row_scales += kBlockLanes) {
    I32 sum[2] = {load_i32(walk.starts), load_i32(walk.starts + kLanes)};
    walk.add(f.act_group, sum);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      acc[v] = fma(sum_to_f32<kSmall>(sum[v]), load(row_scales + v * kLanes), acc[v]);
    }
  }
  B::store_sums(out, kTile, acc[0]);
  B::store_sums(out + 4 * kTile, kTile, acc[1]);
}

// All outputs of a block, as functions of their own: see outlined.
template <class B, ZeroKind kZero, bool kSmall>
SLMOPS_NOINLINE void group_tile(const Format& f, int64_t count, const BlockRoom& room,
                                const int8_t* codes, float* sums) {
  for (int quarter = 0; quarter < 8; ++quarter) {
    group_block<B, kZero, kSmall>(f, count, quarter, room, codes, sums + 4 * quarter);
  }
}
template <class B, bool kSmall>
SLMOPS_NOINLINE void sub16_tile(const Format& f, int64_t count, const BlockRoom& room,
                                const int8_t* codes, float* sums) {
  for (int quarter = 0; quarter < 8; ++quarter) {
    sub16_block<B, kSmall>(f, count, quarter, room, codes, sums + 4 * quarter);
  }
}

/// prefetch_share of a block's rows, four lines at a time.
SLMOPS_INLINE void prefetch_block_share(const Step& s, int64_t row) {
  constexpr int64_t kBytes = 4 * kLineBytes;
  const int64_t blocks = (s.rows() + kCodeRows - 1) / kCodeRows;
  const int64_t share = (s.chunk_bytes / kBytes + blocks - 1) / blocks * kBytes;
  const uint8_t* next = s.chunk.lines + s.chunk_bytes + (row - s.begin) / kCodeRows * share;
  for (const uint8_t* end = next + share; next < end; next += kBytes) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kBytes; i += kLineBytes) prefetch(next + i);
  }
}

/// Calls prepare(row, rows present) and run(codes, sums) for blocks of 8 rows, as long as more than
/// kFewRows are left; returns the first row that is left. Of rows that are missing the codes may be
/// anything.
template <class Prepare, class Run>
SLMOPS_INLINE int64_t for_blocks_of_8(const Step& s, const Prepare& prepare, const Run& run) {
  int64_t row = s.begin;
  for (; s.end - row > kFewRows; row += kCodeRows) {
    const int64_t present = s.end - row < kCodeRows ? s.end - row : kCodeRows;
    prefetch_block_share(s, row);
    prepare(row, present);
    float* sums = s.sums + (row - s.begin) * kTile;
    float padded[kCodeRows * kTile];
    float* at = present == kCodeRows ? sums : padded;
    const size_t bytes = static_cast<size_t>(present * kTile) * sizeof(float);
    if (at == padded) {
      memset(padded, 0, sizeof(padded));
      memcpy(padded, sums, bytes);
    }
    run(s.args.rows.blocks + row * s.args.format->k_padded + s.k * kCodeRows, at);
    if (at == padded) memcpy(sums, padded, bytes);
    if (s.finish) finish_pass(s, row, row + present);
  }
  return row < s.end ? row : s.end;
}

template <class B, int kBits, ZeroKind kZero>
inline int64_t group_blocks(const Step& s) {
  const Format& f = *s.args.format;
  const int64_t count = s.chunk.count, unit = preset_unit(f);
  const BlockRoom room(s.room, count);
  const bool small = has_small_sums(unit);
  group_operands<B, kBits>(f, s.chunk, room.operands);
  group_factors<B, kBits, kZero>(f, s.chunk, room);
  return for_blocks_of_8(
      s,
      [&](int64_t row, int64_t present) {
        const PassRows rows = s.rows_at(row, 0);
        block_scales<B>(f, rows, count, present, room);
        block_starts<B, kZero, kBits == 8 ? kDot8Bias : 0>(rows, count / unit, present,
                                                           small ? kSumBias : 0, room);
      },
      [&](const int8_t* codes, float* sums) {
        if (small) return group_tile<B, kZero, true>(f, count, room, codes, sums);
        group_tile<B, kZero, false>(f, count, room, codes, sums);
      });
}

template <class B>
inline int64_t sub16_blocks(const Step& s) {
  const Format& f = *s.args.format;
  const int64_t count = s.chunk.count;
  const BlockRoom room(s.room, count);
  const bool small = has_small_sums(f.act_group);
  sub16_operands<B>(s.chunk, room.operands);
  return for_blocks_of_8(
      s,
      [&](int64_t row, int64_t present) {
        const PassRows rows = s.expanded_rows_at(row, 0);
        block_scales<B>(f, rows, count, present, room);
        block_starts<B, ZeroKind::none, 0>(rows, count / f.act_group, present, small ? kSumBias : 0,
                                           room);
      },
      [&](const int8_t* codes, float* sums) {
        if (small) return sub16_tile<B, true>(f, count, room, codes, sums);
        sub16_tile<B, false>(f, count, room, codes, sums);
      });
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
