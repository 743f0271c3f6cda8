// Steps of linear, activations="int8", on a row with a matrix unit: it makes the integer sums of
// many rows for a span of k, which the passes of all rows then scale and add.
//
// The sums are exact, so the outputs have the bits of the row's other steps.
#pragma once
#include "linear_steps.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// Integer sums of the units of a span, [unit][kMostMatrixRows][kTile], from a pass's first row on.
struct MadeDots {
  static constexpr int64_t unit = 0;
  static constexpr bool alone = false;
  const int32_t* sums;

  template <int kRows, int kLines>
  SLMOPS_INLINE void add(const uint8_t* /*lines*/, int half, int64_t /*k*/, int64_t /*unit*/,
                         I32 (&sum)[kRows][kLines]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        sum[r][l] = sum[r][l] + load_i32(sums + r * kTile + (half + l) * kLanes);
      }
    }
    sums += kMostMatrixRows * kTile;
  }
};

/// Part of a step's chunk, and the scratch that its integer sums go to.
struct Span {
  int64_t begin, count;  // k of the chunk
  int32_t* sums;
};

/// The integer sums of a span for all rows, a block at a time, each used by pass(acc, half, row,
/// dots) before the next; lines_of(i) are the int8 lines of the span's unit i.
template <class M, class Lines, class Pass>
SLMOPS_INLINE void for_blocks(const Step& s, const M& matrix, const Span& span,
                              const Lines& lines_of, const Pass& pass) {
  const Format& f = *s.args.format;
  const int64_t unit = matrix_unit(f), total = s.rows();
  for (int64_t row = s.begin; row < s.end;) {
    const int64_t left = s.end - row;
    const int blocks = left > M::kRows && total >= 2 * M::kRows ? 2 : 1;
    // The last block begins earlier where too few rows are left; their sums are made again.
    const int64_t rows = blocks * M::kRows;
    const int64_t first = left < rows ? s.end - rows : row;
    const int8_t* codes = s.args.rows.codes + first * f.k_padded + s.k + span.begin;
    int32_t* sums = span.sums;
    for (int64_t i = 0; i * unit < span.count; ++i, codes += unit) {
      if (blocks == 2) {
        matrix.template dots<2>(codes, f.k_padded, lines_of(i), unit, sums);
      } else {
        matrix.template dots<1>(codes, f.k_padded, lines_of(i), unit, sums);
      }
      sums += kMostMatrixRows * kTile;
    }
    for_passes(s, row, first + rows, [&](auto& acc, int half, int64_t r) {
      pass(acc, half, r, MadeDots{span.sums + (r - first) * kTile});
    });
    row = first + rows;
  }
}

/// Calls body(part, span) for the spans of a chunk, `part` being the step of one; the sums stand
/// behind `used` bytes of room.
template <class Body>
SLMOPS_INLINE void for_spans(const Step& s, int64_t used, const Body& body) {
  const int64_t length = matrix_span(*s.args.format);
  int32_t* sums = reinterpret_cast<int32_t*>(s.room + used);
  for (int64_t k = 0; k < s.chunk.count; k += length) {
    const int64_t left = s.chunk.count - k;
    Step part = s;
    part.finish = s.finish && left <= length;
    body(part, Span{k, left < length ? left : length, sums});
  }
}

/// int4 lines as int8 lines.
inline void widen_int4(const uint8_t* lines, int64_t count, uint8_t* out) {
  for (int64_t k = 0; k < count; k += 8, lines += 2 * kLineBytes, out += 4 * kLineBytes) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Line line = load_line(lines + half * kLineBytes);
      store_line(out + half * kLineBytes, low_nibbles(line));
      store_line(out + (2 + half) * kLineBytes, high_nibbles(line));
    }
  }
}

template <int kBits, ZeroKind kZero, class M>
inline void group_step(const Step& s, const M& matrix) {
  const Format& f = *s.args.format;
  const int64_t unit = matrix_unit(f);
  const int64_t room = kBits == 4 ? matrix_span(f) * kTile : 0;
  GroupWalk walk = {s.chunk.lines, 0, 0};
  for_spans(s, room, [&](const Step& part, const Span& span) {
    const GroupWalk start = walk;
    const uint8_t* unit_lines[kMostMatrixUnits];
    for (int64_t i = 0; i * unit < span.count; ++i, walk.advance(f, unit)) {
      unit_lines[i] = walk.lines<kBits>();
      if constexpr (kBits == 4) {
        uint8_t* wide = s.room + i * unit * kTile;
        widen_int4(unit_lines[i], unit, wide);
        unit_lines[i] = wide;
      }
    }
    for_blocks(
        part, matrix, span, [&](int64_t i) { return unit_lines[i]; },
        [&](auto& acc, int half, int64_t row, MadeDots dots) {
          if (span.begin == 0 && s.rows() > kShareRows) s.prefetch_share(row);
          group_pass<kBits, kZero>(f, start, span.begin + span.count, half, dots,
                                   s.rows_at(row, span.begin / f.act_group), acc);
        });
  });
}

template <class M>
inline void sub16_step(const Step& s, const M& matrix) {
  const Format& f = *s.args.format;
  const int64_t unit = matrix_unit(f);
  expand_chunk(s.chunk, s.room, store_lines);
  const int64_t length = chunk_length(f);
  for_spans(s, (length < f.k_padded ? length : f.k_padded) * kTile,
            [&](const Step& part, const Span& span) {
              const Chunk lines = {s.room + span.begin * kTile, span.count};
              for_blocks(
                  part, matrix, span, [&](int64_t i) { return lines.lines + i * unit * kTile; },
                  [&](auto& acc, int half, int64_t row, MadeDots dots) {
                    if (span.begin == 0) s.prefetch_share(row);
                    expanded_pass(f, lines, half, dots,
                                  s.expanded_rows_at(row, span.begin / f.act_group), acc);
                  });
            });
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
