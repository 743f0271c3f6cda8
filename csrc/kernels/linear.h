// out[m][n] = act_scale * sum over k of code[m][k] * (u[n][k] - z) * s, in the order of
// docs/arithmetic.md: a tile's 32 outputs for a block of rows.
//
// k goes in chunks whose lines stay in the first-level cache while all rows pass over them, a few
// rows at a time; between chunks the fp32 sums wait in scratch. k is walked once, upwards, and
// lanes are outputs, so a result depends on nothing but its own row and output.
#pragma once
#include "linear_float.h"
#include "linear_pairs.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// Halves of a tile that a pass keeps in registers.
template <int kRows>
constexpr int kPassLines = kRows <= kWideRows ? 2 : 1;

/// Calls pass(acc, half, row) for all rows, kMaxRows at a time, and all halves; `sums` has 32 per
/// row.
template <class Pass>
SLMOPS_INLINE void for_passes(int64_t begin, int64_t end, float* sums, const Pass& pass) {
  for (int64_t row = begin; row < end; row += kMaxRows) {
    with_constant<kMaxRows>(end - row < kMaxRows ? end - row : kMaxRows, [&](auto count) {
      constexpr int kRows = decltype(count)::value, kLines = kPassLines<kRows>;
      for (int half = 0; half < 2; half += kLines) {
        float* mine = sums + (row - begin) * kTile + half * kLanes;
        F32 acc[kRows][kLines];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
          for (int l = 0; l < kLines; ++l) acc[r][l] = load(mine + r * kTile + l * kLanes);
        }
        pass(acc, half, row);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
          for (int l = 0; l < kLines; ++l) store(mine + r * kTile + l * kLanes, acc[r][l]);
        }
      }
    });
  }
}

/// A block of rows at one chunk of a tile.
struct Step {
  const LinearArgs& args;
  int64_t begin, end;  // rows
  float* sums;         // 32 of each row
  uint8_t* expanded;   // room for the chunk's lines as int8
  Chunk chunk;
  int64_t chunk_bytes;
  int64_t k, act_group, unit;                            // the chunk's first
  int64_t act_groups, presets_per_row, presets_per_act;  // of a whole row, of an activation group

  PassRows rows_at(int64_t row) const {
    const int64_t k_padded = args.format->k_padded;
    return {args.rows.codes + row * k_padded + k,
            k_padded,
            args.rows.scale + row * act_groups + act_group,
            act_groups,
            args.rows.presets + row * presets_per_row + unit,
            presets_per_row,
            presets_per_act};
  }
};

constexpr int64_t kShareRows = 64;
constexpr int kNextLines = 16;  // 0 to 6 % of the time of 1 to 4 rows; 64 cost 10 % (Zen 4)

/// Asks for the bytes after the chunk, a share of them at each of its passes, so that memory works
/// while the passes over lines in the cache do. With larger shares than those of 64 rows it costs
/// more than it brings, unless expanding goes between (Zen 4).
SLMOPS_INLINE void prefetch_share(const Step& s, int64_t row) {
  const int64_t passes = (s.end - s.begin + kMaxRows - 1) / kMaxRows;
  const int64_t share = (s.chunk_bytes / kLineBytes + passes - 1) / passes * kLineBytes;
  const uint8_t* next = s.chunk.lines + s.chunk_bytes + (row - s.begin) / kMaxRows * share;
  for (int64_t i = 0; i < share; i += kLineBytes) prefetch(next + i);
}

/// The same from operands, which are made first.
template <int kBits, ZeroKind kZero>
inline void group_pair_step(const Step& s) {
  group_operands<Pairs, kBits>(*s.args.format, s.chunk, s.expanded);
  for_passes(s.begin, s.end, s.sums, [&](auto& acc, int half, int64_t row) {
    prefetch_share(s, row);
    const PassRows rows = s.rows_at(row);
    group_pass<kBits, kZero>(*s.args.format, s.chunk, half,
                             PairDots<Pairs>{rows.codes, rows.code_stride, s.expanded}, rows, acc);
  });
}

template <int kBits, ZeroKind kZero>
inline void group_step(const Step& s) {
  if constexpr (kPairs) {
    if (s.end - s.begin >= kExpandRows) return group_pair_step<kBits, kZero>(s);
  }
  for_passes(s.begin, s.end, s.sums, [&](auto& acc, int half, int64_t row) {
    if (s.end - s.begin > kShareRows) prefetch_share(s, row);
    const PassRows rows = s.rows_at(row);
    group_pass<kBits, kZero>(*s.args.format, s.chunk, half,
                             LineDots<kBits>{rows.codes, rows.code_stride}, rows, acc);
  });
}

template <int kBits>
inline void bits_step(const Step& s) {
  switch (s.args.format->zero_kind) {
    case ZeroKind::none:
      return group_step<kBits, ZeroKind::none>(s);
    case ZeroKind::int16:
      return group_step<kBits, ZeroKind::int16>(s);
    case ZeroKind::floating:
      return group_step<kBits, ZeroKind::floating>(s);
  }
}

/// Stores 8 k of 16 outputs of sub16 as int8: as two lines, or as operands of pairs, which take as
/// much room.
template <class P>
SLMOPS_INLINE void store_expanded(uint8_t* out, int half, Line low, Line high) {
  if constexpr (kPairs) {
    P::store_operands(out + half * kOperandBytes, low, high);
  } else {
    store_line(out + half * kLineBytes, low);
    store_line(out + (2 + half) * kLineBytes, high);
  }
}

template <class P>
SLMOPS_INLINE auto expanded_dots(const PassRows& rows, const uint8_t* expanded) {
  if constexpr (kPairs) {
    return PairDots<P>{rows.codes, rows.code_stride, expanded};
  } else {
    return LineDots<8>{rows.codes, rows.code_stride};
  }
}

inline void sub16_step(const Step& s) {
  const Format& f = *s.args.format;
  if (kExpandRows > 0 && s.end - s.begin >= kExpandRows) {
    expand_chunk(s.chunk, s.expanded, [](uint8_t* out, int half, Line low, Line high) {
      store_expanded<Pairs>(out, half, low, high);
    });
    const Chunk lines = {s.expanded, s.chunk.count};
    for_passes(s.begin, s.end, s.sums, [&](auto& acc, int half, int64_t row) {
      prefetch_share(s, row);
      PassRows rows = s.rows_at(row);
      rows.presets += f.k_padded / kSubGroup - s.unit + s.act_group;
      expanded_pass(f, lines, half, expanded_dots<Pairs>(rows, s.expanded), rows, acc);
    });
  } else if (f.act_group >= kSubBlock) {
    for_passes(s.begin, s.end, s.sums, [&](auto& acc, int half, int64_t row) {
      sub16_pass<true>(f, s.chunk, half, s.rows_at(row), acc);
    });
  } else {
    for_passes(s.begin, s.end, s.sums, [&](auto& acc, int half, int64_t row) {
      sub16_pass<false>(f, s.chunk, half, s.rows_at(row), acc);
    });
  }
}

inline void float_step(const Step& s) {
  const Format& f = *s.args.format;
  for_passes(s.begin, s.end, s.sums, [&](auto& acc, int half, int64_t row) {
    constexpr int kRows = sizeof(acc) / sizeof(acc[0]);
    constexpr int kLines = sizeof(acc[0]) / sizeof(acc[0][0]);
    const float* x = s.args.x + row * f.k_padded + s.k;
    for (int l = 0; l < kLines; ++l) {
      F32 column[kRows];
      for (int r = 0; r < kRows; ++r) column[r] = acc[r][l];
      if (f.scale_kind == ScaleKind::sub16) {
        float_sub16_pass<kRows>(s.chunk, half + l, x, f.k_padded, column);
      } else {
        float_group_pass<kRows>(f, s.chunk, half + l, x, f.k_padded, column);
      }
      for (int r = 0; r < kRows; ++r) acc[r][l] = column[r];
    }
  });
}

/// Own scales of sub16 outputs, bias, the one rounding to the output's type.
inline void finish_tile(const LinearArgs& args, const uint8_t* own_scales, int64_t first_output,
                        int64_t begin, int64_t end, const float* sums) {
  const Format& f = *args.format;
  for (int half = 0; half < 2; ++half) {
    const int64_t n = first_output + half * kLanes;
    const int64_t count = f.n - n < kLanes ? f.n - n : kLanes;
    if (count <= 0) return;
    F32 own = splat(1.0f), bias = splat(0.0f);
    if (f.scale_kind == ScaleKind::sub16) {
      own = load(reinterpret_cast<const float*>(own_scales + half * 64));
    }
    if (args.bias != nullptr) {
      bias = count == kLanes ? load_as(args.bias_type, args.bias, n)
                             : load_tail(args.bias_type, args.bias, n, count);
    }
    for (int64_t row = begin; row < end; ++row) {
      F32 y = load(sums + (row - begin) * kTile + half * kLanes);
      if (f.scale_kind == ScaleKind::sub16) y = y * own;
      if (args.bias != nullptr) y = y + bias;
      const int64_t at = (row - args.first_row) * args.out_stride + n - args.first_output;
      if (count == kLanes) {
        store_as(args.out_type, args.out, at, y);
      } else {
        store_tail(args.out_type, args.out, at, y, count);
      }
    }
  }
}

/// The table's entry: every format and activation mode.
inline void linear(const LinearArgs& args, int64_t tile_index, int64_t begin, int64_t end) {
  const Format& f = *args.format;
  const uint8_t* tile = args.packed + kHeaderBytes + tile_index * f.tile_bytes;
  float* sums = reinterpret_cast<float*>(args.scratch);
  const size_t sum_bytes = static_cast<size_t>((end - begin) * kTile) * sizeof(float);
  memset(sums, 0, sum_bytes);
  const bool whole = end - begin <= kStreamRows && f.scale_kind == ScaleKind::group;
  const int64_t length = whole ? f.k_padded : chunk_length(f);
  const int64_t block = scale_block(f), unit = preset_unit(f);
  Step s = {.args = args,
            .begin = begin,
            .end = end,
            .sums = sums,
            .expanded = args.scratch + sum_bytes,
            .chunk = {tile, length},
            .chunk_bytes = length / block * f.group_bytes,
            .k = 0,
            .act_group = 0,
            .unit = 0,
            .act_groups = f.k_padded / f.act_group,
            .presets_per_row = presets_per_row(f),
            .presets_per_act = f.act_group / unit};
  const int64_t chunk_act_groups = length / f.act_group, chunk_units = length / unit;
  for (; s.k < f.k_padded; s.k += length) {
    if (f.k_padded - s.k < length) s.chunk.count = f.k_padded - s.k;
    if (f.activations != Activations::int8) {
      float_step(s);
    } else if (f.scale_kind == ScaleKind::sub16) {
      sub16_step(s);
    } else if (f.bits == 4) {
      bits_step<4>(s);
    } else {
      bits_step<8>(s);
    }
    s.chunk.lines += s.chunk_bytes;
    s.act_group += chunk_act_groups;
    s.unit += chunk_units;
  }
  // What follows in memory is the next tile: memory works while this one is finished.
  if (end - begin <= kStreamRows) {
    for (int i = 0; i < kNextLines; ++i) prefetch(tile + f.tile_bytes + i * kLineBytes);
  }
  finish_tile(args, tile + f.k_padded / block * f.group_bytes, tile_index * kTile, begin, end,
              sums);
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
