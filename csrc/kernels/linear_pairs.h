// Integer dots of a pass on rows in pairs, for instruction sets that multiply small matrices: from
// a chunk whose lines were made into their operands once for all rows.
//
// What `Pairs` has of the SIMD contract stands in scalar.h. The sums are the same int32 as those of
// linear_dots.h.
#pragma once
#include "linear_steps.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// Bytes of the operands of 8 k of 16 outputs.
constexpr int64_t kOperandBytes = 2 * kLineBytes;

/// The dots of a unit: as LineDots, from the operands of a chunk.
template <class P>
struct PairDots {
  const int8_t* codes;
  int64_t stride;
  const uint8_t* operands;

  template <int kRows, int kLines>
  SLMOPS_INLINE void add(const uint8_t* /*lines*/, int half, int64_t k, int64_t unit,
                         I32 (&sum)[kRows][kLines]) const {
    // An odd last row is its own partner; the second result is dropped.
    constexpr int kPaired = kRows + kRows % 2;
    for (int l = 0; l < kLines; ++l) {
      I32 pair[kPaired];
#pragma GCC unroll 8
      for (int r = 0; r < kPaired; ++r) pair[r] = sum[r < kRows ? r : kRows - 1][l];
#pragma GCC unroll 4
      for (int r = 0; r < kPaired; r += 2) P::begin(pair[r], pair[r + 1]);
      const uint8_t* w = operands + (k / 8 * 2 + half + l) * kOperandBytes;
      for (int64_t i = k; i < k + unit; i += 16, w += 4 * kOperandBytes) {
        add_16<kPaired, kRows>(w, codes + i, pair);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kPaired; r += 2) P::end(pair[r], pair[r + 1]);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][l] = pair[r];
    }
  }

  /// Adds 16 k of 16 outputs.
  template <int kPaired, int kRows>
  SLMOPS_INLINE void add_16(const uint8_t* w, const int8_t* at, I32 (&pair)[kPaired]) const {
    Codes row[kPaired];
#pragma GCC unroll 8
    for (int r = 0; r < kPaired; ++r)
      row[r] = load_codes(at + (r < kRows ? r : kRows - 1) * stride);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kPaired; r += 2) {
        P::add(pair[r], pair[r + 1], w + 2 * i * kOperandBytes, row[r], row[r + 1], i);
      }
    }
  }
};

/// Operands of a chunk of int4 or int8 lines of `group` formats.
template <class P, int kBits>
inline void group_operands(const Format& f, const Chunk& chunk, uint8_t* out) {
  constexpr int64_t kLineK = kBits == 4 ? 8 : 4;
  const int64_t line_bytes = f.group / kLineK * 2 * kLineBytes;
  const uint8_t* group = chunk.lines;
  for (int64_t k = 0; k < chunk.count; k += f.group, group += f.group_bytes) {
    for (const uint8_t* line = group; line < group + line_bytes;) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half, out += kOperandBytes) {
        const Line first = load_line(line + half * kLineBytes);
        if constexpr (kBits == 4) {
          P::store_operands(out, low_nibbles(first), high_nibbles(first));
        } else {
          P::store_operands(out, first, load_line(line + (2 + half) * kLineBytes));
        }
      }
      line += kBits == 4 ? 2 * kLineBytes : 4 * kLineBytes;
    }
  }
}

template <class P, int kBits, ZeroKind kZero>
inline void group_pair_step(const Step& s) {
  const Format& f = *s.args.format;
  group_operands<P, kBits>(f, s.chunk, s.room);
  for_passes(s.begin, s.end, s.sums, [&](auto& acc, int half, int64_t row) {
    prefetch_share(s, row);
    const PassRows rows = s.rows_at(row, 0);
    group_pass<kBits, kZero>(f, {s.chunk.lines, 0, 0}, s.chunk.count, half,
                             PairDots<P>{rows.codes, rows.code_stride, s.room}, rows, acc);
  });
}

template <class P>
inline void sub16_pair_step(const Step& s) {
  const Format& f = *s.args.format;
  expand_chunk(s.chunk, s.room, [](uint8_t* out, int half, Line low, Line high) {
    P::store_operands(out + half * kOperandBytes, low, high);
  });
  for_passes(s.begin, s.end, s.sums, [&](auto& acc, int half, int64_t row) {
    prefetch_share(s, row);
    const PassRows rows = s.expanded_rows_at(row, 0);
    expanded_pass(f, s.chunk, half, PairDots<P>{rows.codes, rows.code_stride, s.room}, rows, acc);
  });
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
