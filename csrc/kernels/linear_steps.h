// Steps of linear: a block of rows at a chunk of a tile, a few rows at a time.
#pragma once
#include "linear_float.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// Rows up to which passes ask for the next chunk's lines as they read; of more, the share of each
/// is so small that it is asked for at once.
constexpr int64_t kShareRows = 64;
/// A pass of so many rows alone asks ahead on any CPU: it takes so long over each line that the
/// hardware's own prefetching lags behind (Zen 4, 4 rows: 16 % of the time).
constexpr int kSlowRows = 3;
constexpr int64_t kSlowAhead = 2048;
constexpr int kNextLines = 16;  // 0 to 6 % of the time of 1 to 4 rows; 64 cost 10 % (Zen 4)

/// Halves of a tile that a pass keeps in registers.
template <int kRows>
constexpr int kPassLines = kRows <= kWideRows ? 2 : 1;

/// A block of rows at one chunk of a tile.
struct Step {
  const LinearArgs& args;
  int64_t begin, end;  // rows
  float* sums;         // 32 of each row
  uint8_t* room;       // of the scratch behind the sums
  Chunk chunk;
  int64_t chunk_bytes;
  int64_t share;                                         // of those, for each kMaxRows rows
  int64_t k, act_group, unit;                            // the chunk's first
  int64_t act_groups, presets_per_row, presets_per_act;  // of a whole row, of an activation group
  int64_t first_output;
  const uint8_t* own_scales;  // of sub16 outputs
  bool finish;                // rows, once they have been added to

  int64_t rows() const { return end - begin; }
  /// Asks for the chunk after this one, a share of it before each pass, so that memory works while
  /// the passes over lines in the cache do.
  SLMOPS_INLINE void prefetch_share(int64_t row) const {
    const uint8_t* next = chunk.lines + chunk_bytes + (row - begin) / kMaxRows * share;
    for (int64_t i = 0; i < share; i += kLineBytes) prefetch(next + i);
  }
  /// What a pass of kRows rows and kLines halves asks for in `calls` calls: if no other reads its
  /// lines, those that it reads soon; else its share of the chunk after this one.
  template <int kRows, int kLines>
  SLMOPS_INLINE Ask ask(int64_t row, int half, int64_t calls) const {
    if (rows() == kRows && kLines == 2) {
      const bool slow = kRows >= kSlowRows && args.read_ahead == 0;
      const int64_t ahead = slow ? kSlowAhead : args.read_ahead;
      const uint8_t* at = chunk.lines + ahead;
      return {at, at, ahead == 0 ? 0 : chunk_bytes / calls};
    }
    const int64_t parts = rows() * 2, before = (row - begin) * 2 + half * kRows;
    const uint8_t* at = chunk.lines + chunk_bytes + chunk_bytes * before / parts;
    return {at, at, chunk_bytes * kRows * kLines / (parts * calls)};
  }
  SLMOPS_INLINE float* sums_at(int64_t row) const { return sums + (row - begin) * kTile; }
  /// Rows from `row` on, beginning `later` activation groups after the chunk.
  SLMOPS_INLINE PassRows rows_at(int64_t row, int64_t later) const {
    const int64_t k_padded = args.format->k_padded;
    return {args.rows.codes + row * k_padded + k + later * args.format->act_group,
            k_padded,
            args.rows.scale + row * act_groups + act_group + later,
            act_groups,
            args.rows.presets + row * presets_per_row + unit + later * presets_per_act,
            presets_per_row,
            presets_per_act};
  }
  /// The same with the presets of expanded sub16 lines.
  SLMOPS_INLINE PassRows expanded_rows_at(int64_t row, int64_t later) const {
    PassRows rows = rows_at(row, later);
    rows.presets = args.rows.presets + row * presets_per_row + args.format->k_padded / kSubGroup +
                   act_group + later;
    return rows;
  }
};

/// Own scales of sub16 outputs, bias, the one rounding to the output's type.
SLMOPS_INLINE void finish_rows(const Step& s, int64_t begin, int64_t end) {
  const LinearArgs& args = s.args;
  const Format& f = *args.format;
  for (int half = 0; half < 2; ++half) {
    const int64_t n = s.first_output + half * kLanes;
    const int64_t count = f.n - n < kLanes ? f.n - n : kLanes;
    if (count <= 0) return;
    F32 own = splat(1.0f), bias = splat(0.0f);
    if (f.scale_kind == ScaleKind::sub16) {
      own = load(reinterpret_cast<const float*>(s.own_scales + half * 64));
    }
    if (args.bias != nullptr) {
      bias = count == kLanes ? load_as(args.bias_type, args.bias, n)
                             : load_tail(args.bias_type, args.bias, n, count);
    }
    for (int64_t row = begin; row < end; ++row) {
      F32 y = load(s.sums_at(row) + half * kLanes);
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

/// The same as a function of its own, which takes no registers from a pass.
SLMOPS_NOINLINE void finish_pass(const Step& s, int64_t begin, int64_t end) {
  finish_rows(s, begin, end);
}

/// Calls pass(acc, half, row) for kRows rows of the step, from `row` on.
template <int kRows, class Pass>
SLMOPS_INLINE void run_pass(const Step& s, int64_t row, int half, const Pass& pass) {
  constexpr int kLines = kPassLines<kRows>;
  float* mine = s.sums_at(row) + half * kLanes;
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

/// The same as a function of its own.
template <int kRows, class Pass>
SLMOPS_NOINLINE void run_pass_apart(const Step& s, int64_t row, int half, const Pass& pass) {
  run_pass<kRows>(s, row, half, pass);
}

/// The same for all halves. Where one of them fills the registers, each pass is a function: several
/// in one would share them badly (g++ 12, 4 rows of sub16: 1.4 times the instructions on AArch64,
/// 1.9 times the time on AVX-VNNI). Elsewhere that would cost 3 % of sub16 and 5 % of int8.
template <int kRows, class Pass>
SLMOPS_INLINE void pass_over(const Step& s, int64_t row, const Pass& pass) {
  for (int half = 0; half < 2; half += kPassLines<kRows>) {
    if constexpr (kPassLines<kMaxRows> == 1) {
      run_pass_apart<kRows>(s, row, half, pass);
    } else {
      run_pass<kRows>(s, row, half, pass);
    }
  }
  if (s.finish) finish_pass(s, row, row + kRows);
}

/// The same for rows [begin, end) and all halves, kMaxRows at a time.
template <class Pass>
SLMOPS_INLINE void for_passes(const Step& s, int64_t begin, int64_t end, const Pass& pass) {
  for (int64_t row = begin; row < end; row += kMaxRows) {
    with_constant<kMaxRows>(end - row < kMaxRows ? end - row : kMaxRows,
                            [&](auto count) { pass_over<decltype(count)::value>(s, row, pass); });
  }
}

/// for_passes with pass(acc, half, row, ask), which calls ask.more() `calls` times.
template <class Pass>
SLMOPS_INLINE void for_asking_passes(const Step& s, int64_t begin, int64_t end, int64_t calls,
                                     const Pass& pass) {
  const bool many = s.rows() > kShareRows;
  for (; many && end - begin >= kMaxRows; begin += kMaxRows) {
    s.prefetch_share(begin);
    pass_over<kMaxRows>(s, begin,
                        [&](auto& acc, int half, int64_t row) { pass(acc, half, row, NoAsk{}); });
  }
  for_passes(s, begin, end, [&](auto& acc, int half, int64_t row) {
    constexpr int kRows = sizeof(acc) / sizeof(acc[0]);
    constexpr int kLines = sizeof(acc[0]) / sizeof(acc[0][0]);
    pass(acc, half, row, many ? Ask{} : s.ask<kRows, kLines>(row, half, calls));
  });
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
