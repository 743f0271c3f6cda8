// swiglu: down(activation(gate(x)) * up(x)), fp32 between the projections.
//
// The packed gate_up alternates tiles of gate and up. A unit is a span of columns of down's
// activation groups: its pairs of tiles go to fp32 scratch, from which its part of down's input is
// made. An activation group of all columns, or float activations, want h of whole rows first.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <vector>

#include "matmul.h"
#include "rows.h"

namespace slmops {
namespace {

constexpr char kOp[] = "swiglu";

/// A call, checked.
struct Problem {
  const Format &gate_up, &down;
  SourceRows x;
  const uint8_t *packed_gate_up, *packed_down;
  const float* gate_up_bias;  // in the order of the tiles, or null
  const Bias& down_bias;
  Activation activation;
  uint8_t* out;
  DType out_type;
};

/// Columns of h that a unit makes: whole activation groups of down, whole blocks of sub16. 0 where
/// h of all of a row is wanted.
int64_t span_of(const Format& down) {
  if (!is_int8(down) || down.act_group > 128) return 0;
  return std::max(down.act_group, kSubBlock);
}

/// h of all rows, in spans of `span` columns.
void run_gate_up(const Problem& p, const SlabActivations& x, const GateArgs& gate, int64_t span,
                 int64_t rows) {
  const Format& f = p.gate_up;
  const int64_t columns_in_all = p.down.k_padded;
  const Cut cut = cut_work((columns_in_all + span - 1) / span, rows, f.k_padded * 2 * span);
  const int64_t linear_bytes = aligned_bytes(scratch_bytes(f, cut.block));
  const int64_t share_bytes =
      linear_bytes + aligned_bytes(cut.block * 2 * span * int64_t{sizeof(float)});
  Scratch scratch(cut.shares * share_bytes);
  uint8_t* shares = scratch.take<uint8_t>(cut.shares * share_bytes);
  LinearArgs args = linear_args(f, p.packed_gate_up, x);
  args.bias = p.gate_up_bias;
  const KernelTable& table = kernels();
  run_cut(cut, [&](int64_t share, int64_t unit, int64_t first, int64_t last) {
    const int64_t column = unit * span, columns = std::min(span, columns_in_all - column);
    const int64_t pairs = std::min(columns / kTile, f.tiles / 2 - column / kTile);
    LinearArgs mine = args;
    mine.scratch = shares + share * share_bytes;
    float* outputs = reinterpret_cast<float*>(mine.scratch + linear_bytes);
    mine.out = outputs;
    mine.out_stride = 2 * columns;
    mine.first_row = first;
    mine.first_output = 2 * column;
    for (int64_t tile = 0; tile < 2 * pairs; ++tile) {
      table.linear(mine, 2 * column / kTile + tile, first, last);
    }
    const int64_t given = std::max<int64_t>(0, std::min(columns, p.down.k - column));
    table.gate(gate, outputs, first, last - first, column, columns, given);
  });
}

void run_slab(const Problem& p, int64_t row, int64_t rows) {
  const Format& down = p.down;
  const int64_t span = span_of(down);
  const bool whole_rows = span == 0;
  const int64_t wide_bytes =
      whole_rows && is_int8(down) ? aligned_bytes(rows * down.k_padded * 4) : 0;
  Scratch scratch(activation_bytes(p.gate_up, rows) + activation_bytes(down, rows) + wide_bytes);
  const SlabActivations x = take_activations(p.gate_up, rows, &scratch);
  const SlabActivations h = take_activations(down, rows, &scratch);
  float* wide = wide_bytes > 0 ? scratch.take<float>(rows * down.k_padded) : h.wide;
  fill_activations(p.gate_up, p.x, row, rows, x);
  const GateArgs gate = {.down = &down,
                         .activation = p.activation,
                         .rows = h.quantized,
                         .wide = whole_rows ? wide : nullptr};
  run_gate_up(p, x, gate, whole_rows ? kSubBlock : span, rows);
  if (wide_bytes > 0) {
    fill_activations(down, {wide, DType::f32, down.k_padded, nullptr}, 0, rows, h);
  }
  run_product({.f = down,
               .packed = p.packed_down,
               .x = h,
               .rows = rows,
               .bias = p.down_bias.data(),
               .bias_type = p.down_bias.type,
               .out = p.out + row * down.n * size_of(p.out_type),
               .out_type = p.out_type});
}

/// The bias of gate and up, [2 * hidden], in the order of the tiles, padded with 0.
std::vector<float> tile_order(const Bias& bias, int64_t hidden, int64_t n) {
  std::vector<float> ordered;
  if (bias.data() == nullptr) return ordered;
  std::vector<float> plain(static_cast<size_t>(2 * hidden));
  kernels().convert(bias.data(), bias.type, plain.data(), DType::f32, 2 * hidden);
  ordered.resize(static_cast<size_t>(n), 0.0f);
  for (int64_t i = 0; i < hidden; ++i) {
    const int64_t gate = i / kTile * 2 * kTile + i % kTile;
    ordered[static_cast<size_t>(gate)] = plain[static_cast<size_t>(i)];
    ordered[static_cast<size_t>(gate + kTile)] = plain[static_cast<size_t>(hidden + i)];
  }
  return ordered;
}

Tensor swiglu(const Tensor& x, const Tensor& gate_up, const Tensor& down, int64_t hidden,
              int64_t out_features, const std::string& activation,
              const std::optional<Tensor>& gate_up_bias, const std::optional<Tensor>& down_bias) {
  SLMOPS_CHECK(hidden >= 1 && hidden <= int64_t{1} << 40, kOp, ": expected hidden in 1..2^40, got ",
               hidden);
  const int64_t tiles = (hidden + kTile - 1) / kTile;
  const Format first =
      weight_format(kOp, "gate_up", gate_up, 2 * kTile * tiles, "64 * ceil(hidden / 32)", x);
  const Format second = packed_format(kOp, down);
  SLMOPS_CHECK(second.n == out_features, kOp, ": expected out_features == ", second.n,
               " (n of the packed weight down), got ", out_features);
  SLMOPS_CHECK(second.k == hidden, kOp, ": expected hidden == ", second.k,
               " (k of the packed weight down), got ", hidden);
  const Bias inner_bias(kOp, "gate_up_bias", gate_up_bias, 2 * hidden);
  const Bias outer_bias(kOp, "down_bias", down_bias, out_features);
  const std::vector<float> ordered = tile_order(inner_bias, hidden, first.n);
  const ScalarType type = x.scalar_type();
  const DType x_type = float_type(kOp, "x", type);
  const Rows rows(x);
  Tensor out = new_rows(x, out_features, type);
  const Problem p = {.gate_up = first,
                     .down = second,
                     .x = {rows.data(), x_type, rows.stride(), nullptr},
                     .packed_gate_up = static_cast<const uint8_t*>(gate_up.const_data_ptr()),
                     .packed_down = static_cast<const uint8_t*>(down.const_data_ptr()),
                     .gate_up_bias = ordered.empty() ? nullptr : ordered.data(),
                     .down_bias = outer_bias,
                     .activation = parse_activation(kOp, activation),
                     .out = static_cast<uint8_t*>(out.mutable_data_ptr()),
                     .out_type = x_type};
  const int64_t m = x.numel() / first.k;
  const int64_t slab =
      slab_rows(row_bytes(first) + second.k_padded * (span_of(second) > 0 ? 1 : 4));
  for (int64_t row = 0; row < m; row += slab) run_slab(p, row, std::min(slab, m - row));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def(
      "swiglu(Tensor x, Tensor gate_up, Tensor down, int hidden, int out_features, str activation, "
      "Tensor? gate_up_bias=None, Tensor? down_bias=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("swiglu", TORCH_BOX(&swiglu)); }

}  // namespace slmops
