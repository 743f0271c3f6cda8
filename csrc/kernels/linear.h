// out[m][n] = act_scale * sum over k of code[m][k] * (u[n][k] - z) * s, in the order of
// docs/arithmetic.md: a tile's 32 outputs for a block of rows.
//
// k goes in chunks whose lines stay in the first-level cache while all rows pass over them, a few
// rows at a time; between chunks the fp32 sums wait in scratch. k is walked once, upwards, and
// lanes are outputs, so a result depends on nothing but its own row and output.
#pragma once
#include "linear_blocks.h"
#include "linear_matrix.h"

namespace slmops::SLMOPS_ISA {
namespace {

// Overloads without and with a matrix unit.
template <int kBits, ZeroKind kZero>
inline void group_step(const Step& s) {
  int64_t begin = s.begin;
  if constexpr (kBlocks) {
    if (s.rows() > kFewRows) begin = group_blocks<Block, kBits, kZero>(s);
  }
  const int64_t calls = s.chunk.count / kLinesK<kBits>;
  for_asking_passes(s, begin, s.end, calls, [&](auto& acc, int half, int64_t row, auto ask) {
    using A = decltype(ask);
    const Format& f = *s.args.format;
    const PassRows rows = s.rows_at(row, 0);
    const auto pass = [&](auto dots) {
      group_pass<kBits, kZero>(f, {s.chunk.lines, 0, 0}, s.chunk.count, half, dots, rows, acc);
    };
    if constexpr (sizeof(acc) / sizeof(acc[0]) == kMaxRows && kLongSums > 1) {
      if (preset_unit(f) > kShortUnit) {
        return pass(LineDots<kBits, A, kLongSums>{rows.codes, rows.code_stride, ask});
      }
      if (f.act_group == kShortUnit) {
        return pass(LineDots<kBits, A, 1, kShortUnit, true>{rows.codes, rows.code_stride, ask});
      }
      return pass(LineDots<kBits, A, 1, kShortUnit>{rows.codes, rows.code_stride, ask});
    }
    pass(LineDots<kBits, A>{rows.codes, rows.code_stride, ask});
  });
}

/// Whether so many rows of sub16 lines are worth expanding them for.
inline bool expands(int64_t rows) {
  return (kExpandRows > 0 && rows >= kExpandRows) || (Matrix::kRows != 0 && rows >= kMatrixRows);
}

inline void sub16_step(const Step& s) {
  const Format& f = *s.args.format;
  int64_t begin = s.begin;
  if constexpr (kBlocks) {
    if (s.rows() > kFewRows) begin = sub16_blocks<Block>(s);
  }
  if (expands(s.rows())) {
    expand_chunk(s.chunk, s.room, store_lines);
    const Chunk lines = {s.room, s.chunk.count};
    for_passes(s, s.begin, s.end, [&](auto& acc, int half, int64_t row) {
      if (half == 0) s.prefetch_share(row);
      const PassRows rows = s.expanded_rows_at(row, 0);
      constexpr int kSums = sizeof(acc) / sizeof(acc[0]) == kMaxRows ? kLongSums : 1;
      const LineDots<8, NoAsk, kSums> dots = {rows.codes, rows.code_stride, {}};
      expanded_pass(f, lines, half, dots, rows, acc);
    });
    return;
  }
  const auto add = [&](auto whole_blocks) {
    const int64_t calls = s.chunk.count / kSubGroup;
    for_asking_passes(s, begin, s.end, calls, [&](auto& acc, int half, int64_t row, auto ask) {
      constexpr bool kWholeBlocks = decltype(whole_blocks)::value != 0;
      sub16_pass<kWholeBlocks>(f, s.chunk, half, s.rows_at(row, 0), ask, acc);
    });
  };
  if (f.act_group >= kSubBlock) return add(Int<1>{});
  add(Int<0>{});
}

inline void float_step(const Step& s) {
  const Format& f = *s.args.format;
  const auto x_at = [&](int64_t row) { return s.args.x + row * f.k_padded + s.k; };
  if (expands_floats(f, s.rows())) {
    float* weights = reinterpret_cast<float*>(s.room);
    expand_floats(f, s.chunk, weights);
    return for_passes(s, s.begin, s.end, [&](auto& acc, int half, int64_t row) {
      if (half == 0) s.prefetch_share(row);
      expanded_float_pass(f, s.chunk.count, weights, half, x_at(row), f.k_padded, acc);
    });
  }
  const int64_t calls = s.chunk.count / 4;
  for_asking_passes(s, s.begin, s.end, calls, [&](auto& acc, int half, int64_t row, auto ask) {
    float_pass(f, s.chunk, half, x_at(row), f.k_padded, ask, acc);
  });
}

/// The step of a format with int8 activations; `matrix` is nothing or the row's matrix unit.
template <class... M>
inline void int8_step(const Step& s, const M&... matrix) {
  const Format& f = *s.args.format;
  const auto with_zero = [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    switch (f.zero_kind) {
      case ZeroKind::none:
        return group_step<kBits, ZeroKind::none>(s, matrix...);
      case ZeroKind::int16:
        return group_step<kBits, ZeroKind::int16>(s, matrix...);
      case ZeroKind::floating:
      case ZeroKind::offset:
        return group_step<kBits, ZeroKind::floating>(s, matrix...);
    }
  };
  if (f.scale_kind == ScaleKind::sub16) return sub16_step(s, matrix...);
  if (f.bits == 4) return with_zero(Int<4>{});
  with_zero(Int<8>{});
}

/// Calls step(s) at every chunk of a tile, in order. Of many rows each is finished by its pass over
/// the last one: its stores, which miss the caches, go on while the next rows' dots do.
template <class Body>
SLMOPS_INLINE void for_chunks(Step& s, int64_t length, const Body& step) {
  const Format& f = *s.args.format;
  const int64_t chunk_act_groups = length / f.act_group, chunk_units = length / preset_unit(f);
  for (; s.k < f.k_padded; s.k += length) {
    if (f.k_padded - s.k < length) s.chunk.count = f.k_padded - s.k;
    s.finish = s.rows() > kStreamRows && s.k + s.chunk.count == f.k_padded;
    step(s);
    s.chunk.lines += s.chunk_bytes;
    s.act_group += chunk_act_groups;
    s.unit += chunk_units;
  }
}

/// The same on the matrix unit of the row, where it has one and the format and the number of rows
/// suit it.
template <class M>
SLMOPS_INLINE bool matrix_chunks(Step& s, int64_t length) {
  if constexpr (M::kRows != 0) {
    static_assert(M::kRows == kMatrixRows && 2 * M::kRows == kMostMatrixRows);
    if (fits_matrix(*s.args.format, s.rows())) {
      const M matrix(matrix_unit(*s.args.format));
      for_chunks(s, length, [&](const Step& step) { int8_step(step, matrix); });
      return true;
    }
  }
  return false;
}

/// k of the chunks for `rows` rows. A single pass takes a tile as one, which it reads once; several
/// do where those after the first can read it from the second-level cache, which keeps up with int4
/// lines.
inline int64_t step_length(const Format& f, int64_t rows) {
  const bool sub16 = f.scale_kind == ScaleKind::sub16;
  const bool whole =
      rows <= kStreamRows && (sub16 ? !expands(rows) : f.bits == 4 || rows <= kMaxRows);
  return whole ? f.k_padded : chunk_length(f);
}

/// Calls steps(s) to add all of a tile to the sums, in chunks of `length` k; then finishes those
/// that are not.
template <class Steps>
SLMOPS_INLINE void walk_tile(const LinearArgs& args, int64_t tile_index, int64_t begin, int64_t end,
                             int64_t length, const Steps& steps) {
  const Format& f = *args.format;
  const uint8_t* tile = args.packed + kHeaderBytes + tile_index * f.tile_bytes;
  float* sums = reinterpret_cast<float*>(args.scratch);
  const size_t sum_bytes = static_cast<size_t>((end - begin) * kTile) * sizeof(float);
  memset(sums, 0, sum_bytes);
  const int64_t block = scale_block(f), unit = preset_unit(f);
  const int64_t chunk_bytes = length / block * f.group_bytes;
  const int64_t passes = (end - begin + kMaxRows - 1) / kMaxRows;
  Step s = {.args = args,
            .begin = begin,
            .end = end,
            .sums = sums,
            .room = args.scratch + sum_bytes,
            .chunk = {tile, length},
            .chunk_bytes = chunk_bytes,
            .share = (chunk_bytes / kLineBytes + passes - 1) / passes * kLineBytes,
            .k = 0,
            .act_group = 0,
            .unit = 0,
            .act_groups = f.k_padded / f.act_group,
            .presets_per_row = presets_per_row(f),
            .presets_per_act = f.act_group / unit,
            .first_output = tile_index * kTile,
            .own_scales = tile + f.k_padded / block * f.group_bytes,
            .finish = false};
  steps(s);
  if (s.finish) return;
  // What follows in memory is the next tile: memory works while this one is finished.
  for (int i = 0; i < kNextLines; ++i) prefetch(tile + f.tile_bytes + i * kLineBytes);
  finish_rows(s, begin, end);
}

/// The table's entry: every format and activation mode.
inline void linear(const LinearArgs& args, int64_t tile, int64_t begin, int64_t end) {
  const Format& f = *args.format;
  const int64_t rows = end - begin;
  const int64_t length = expands_floats(f, rows) ? float_chunk_length(f) : step_length(f, rows);
  walk_tile(args, tile, begin, end, length, [&](Step& s) {
    if (f.activations != Activations::int8) {
      for_chunks(s, length, float_step);
    } else if (!matrix_chunks<Matrix>(s, length)) {
      for_chunks(s, length, [](const Step& step) { int8_step(step); });
    }
  });
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
