// h = activation(gate) * up in fp32, then the input of the down projection: int8 codes per
// activation group, or h itself.
#pragma once
#include "activation.h"
#include "quantize_rows.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// Columns of h from `first` on.
struct SpanRow {
  const float* h;
  int64_t first;

  SLMOPS_INLINE F32 operator()(int64_t k) const { return load(h + (k - first)); }
};

/// h of `given` columns of one row, in place of the gate and up values that it comes from; +0 up
/// to `columns`.
template <Activation kActivation>
SLMOPS_INLINE void gate_row(float* x, int64_t columns, int64_t given) {
  // Written at or before what was read last: h[i] stands at i, its gate and up values at i or
  // later.
  for (int64_t i = 0; i < given; i += kLanes) {
    const float* gate = x + i / kTile * 2 * kTile + i % kTile;
    store(x + i, activate<kActivation>(load(gate)) * load(gate + kTile));
  }
  for (int64_t i = given; i < columns; ++i) x[i] = 0.0f;
}

inline void gate(const GateArgs& args, float* x, int64_t row, int64_t rows, int64_t column,
                 int64_t columns, int64_t given) {
  const Format& f = *args.down;
  with_activation(args.activation, [&](auto constant) {
    for (int64_t i = row; i < row + rows; ++i, x += 2 * columns) {
      gate_row<decltype(constant)::value>(x, columns, given);
      if (args.wide != nullptr) {
        memcpy(args.wide + i * f.k_padded + column, x,
               static_cast<size_t>(columns) * sizeof(float));
      } else {
        quantize_span(f, SpanRow{x, column}, column, column + columns, row_of(f, args.rows, i));
      }
    }
  });
  if (args.wide != nullptr) return;
  if (f.scale_kind == ScaleKind::sub16) {
    sub16_presets(f, args.rows, row, rows, column, column + columns);
  }
  if constexpr (kBlocks) {
    fill_code_blocks<Block>(f, args.rows, row, rows, column, column + columns);
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
