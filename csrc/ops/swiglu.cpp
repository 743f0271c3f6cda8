// swiglu: down(activation(gate(x)) * up(x)), fp32 between the projections.
#include "swiglu.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>

#include "library.h"
#include "parallel.h"
#include "rows.h"
#include "text.h"

namespace slmops {
namespace {

constexpr char kOp[] = "swiglu";

/// Columns of h that a unit makes: whole activation groups of down, whole blocks of sub16. 0 where
/// h of all of a row is wanted.
int64_t span_of(const Format& down) {
  if (!is_int8(down) || down.act_group > 128) return 0;
  return std::max(down.act_group, kSubBlock);
}

/// Columns of a unit, whichever it is.
int64_t unit_columns(const Format& down) {
  return span_of(down) > 0 ? span_of(down) : int64_t{kSubBlock};
}

/// A phase: h of all rows.
void run_gate_up(Worker* worker, const GatedMlp& p, const SlabActivations& x, const GateArgs& gate,
                 int64_t rows, const MlpScratch& scratch) {
  const Format& f = p.gate_up;
  const int64_t all = p.down.k_padded, span = unit_columns(p.down);
  LinearArgs args = linear_args(f, p.packed_gate_up, x);
  args.bias = p.gate_up_bias;
  args.scratch = scratch.product.of(worker->index());
  float* outputs = reinterpret_cast<float*>(scratch.unit.of(worker->index()));
  args.out = outputs;
  const KernelTable& table = worker->table();
  const Cut cut((all + span - 1) / span, rows, worker->size());
  share_cut(worker, cut, [&](int64_t unit, int64_t first, int64_t last) {
    const int64_t column = unit * span, columns = std::min(span, all - column);
    const int64_t pairs = std::min(columns / kTile, f.tiles / 2 - column / kTile);
    args.out_stride = 2 * columns;
    args.first_row = first;
    args.first_output = 2 * column;
    for (int64_t tile = 0; tile < 2 * pairs; ++tile) {
      run_tile(*worker, args, 2 * column / kTile + tile, first, last);
    }
    const int64_t given = std::max<int64_t>(0, std::min(columns, p.down.k - column));
    table.gate(gate, outputs, first, last - first, column, columns, given);
  });
}

}  // namespace

MlpScratch::MlpScratch(const GatedMlp& p, int64_t slab, int64_t workers, Scratch* scratch)
    : h(take_activations(p.down, slab, scratch)), wide(h.wide) {
  const int64_t product_size =
      std::max(product_bytes(p.gate_up, slab), product_bytes(p.down, slab));
  product = scratch->take_each(workers, product_size);
  const int64_t columns = 2 * unit_columns(p.down);
  unit = scratch->take_each(workers, most_block_rows(slab) * columns * int64_t{sizeof(float)});
  if (span_of(p.down) > 0) wide = nullptr;
  if (span_of(p.down) == 0 && is_int8(p.down)) wide = scratch->take<float>(slab * p.down.k_padded);
}

int64_t GatedMlp::slab_rows() const {
  return slmops::slab_rows(row_bytes(gate_up) + down.k_padded * (span_of(down) > 0 ? 1 + kCodeBlocks
                                                                 : is_fast(down)   ? 6
                                                                                   : 4));
}

void run_mlp(Worker* worker, const GatedMlp& p, const SlabActivations& x, int64_t rows, void* out,
             const MlpScratch& scratch) {
  const Format& down = p.down;
  const GateArgs gate = {
      .down = &down, .activation = p.activation, .rows = scratch.h.quantized, .wide = scratch.wide};
  run_gate_up(worker, p, x, gate, rows, scratch);
  if (scratch.wide != nullptr && (is_int8(down) || uses_pairs(*worker, down))) {
    fill_activations(worker, down, {scratch.wide, DType::f32, down.k_padded, nullptr}, 0, rows,
                     scratch.h);
  }
  run_product(worker, {.f = down,
                       .packed = p.packed_down,
                       .x = scratch.h,
                       .rows = rows,
                       .bias = p.down_bias,
                       .bias_type = p.down_bias_type,
                       .out = out,
                       .out_type = p.out_type,
                       .scratch = scratch.product});
}

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

namespace {

/// The same through torch's products, a slab of rows at a time.
void library_swiglu(const Tensor& x, const GatedMlp& p, const Tensor& bias,
                    const std::optional<Tensor>& down_bias, Tensor* out) {
  const Format &first = p.gate_up, &down = p.down;
  const int64_t columns = first.n / 2;
  const KernelTable& table = kernels();
  const Tensor rows = torch::stable::reshape(x, {-1, first.k});
  Tensor target = torch::stable::view(*out, {rows.size(0), down.n});
  const int64_t slab = library_slab_rows(3 * columns * int64_t{sizeof(float)});
  for (int64_t row = 0; row < rows.size(0); row += slab) {
    Tensor part = rows, of_part = target;
    const int64_t count = std::min(slab, rows.size(0) - row);
    part = torch::stable::narrow(part, 0, row, count);
    Tensor gates = library_linear(part, first, p.packed_gate_up,
                                  bias.numel() > 0 ? std::optional<Tensor>(bias) : std::nullopt,
                                  std::nullopt, ScalarType::Float);
    Tensor h = new_tensor({count, down.k_padded}, ScalarType::Float);
    const GateArgs gate = {.down = &down,
                           .activation = p.activation,
                           .rows = {},
                           .wide = static_cast<float*>(h.mutable_data_ptr())};
    float* outputs = static_cast<float*>(gates.mutable_data_ptr());
    parallel(count, share_count(count, columns * 32), [&](int64_t, int64_t begin, int64_t end) {
      table.gate(gate, outputs + begin * 2 * columns, begin, end - begin, 0, columns, down.k);
    });
    of_part = torch::stable::narrow(of_part, 0, row, count);
    torch::stable::copy_(of_part,
                         library_linear(torch::stable::narrow(h, 1, 0, down.k), down, p.packed_down,
                                        down_bias, std::nullopt, out->scalar_type()));
  }
}

Tensor swiglu(const Tensor& x, const Tensor& gate_up, const Tensor& down, int64_t hidden,
              int64_t out_features, Text activation, const std::optional<Tensor>& gate_up_bias,
              const std::optional<Tensor>& down_bias) {
  const Activation function = parse_activation(kOp, activation.take());
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
  const GatedMlp p = {.gate_up = first,
                      .down = second,
                      .packed_gate_up = static_cast<const uint8_t*>(gate_up.const_data_ptr()),
                      .packed_down = static_cast<const uint8_t*>(down.const_data_ptr()),
                      .gate_up_bias = ordered.empty() ? nullptr : ordered.data(),
                      .down_bias = outer_bias.data(),
                      .down_bias_type = outer_bias.type,
                      .activation = function,
                      .out_type = x_type};
  const SourceRows src = {rows.data(), x_type, rows.stride(), nullptr};
  uint8_t* y = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t m = x.numel() / first.k, slab = std::min(m, p.slab_rows());
  if (m == 0) return out;
  if (by_library(first, m) && by_library(second, m)) {
    Tensor bias = new_tensor({static_cast<int64_t>(ordered.size())}, ScalarType::Float);
    if (!ordered.empty()) {
      memcpy(bias.mutable_data_ptr(), ordered.data(), ordered.size() * sizeof(float));
    }
    library_swiglu(x, p, bias, down_bias, &out);
    return out;
  }
  const int64_t workers = Team::size_for(m * first.k_padded * first.n, m);
  Scratch scratch;
  const SlabActivations activations = take_activations(first, slab, &scratch);
  const MlpScratch own(p, slab, workers, &scratch);
  Team::run(workers, [&](Worker& worker) {
    for (int64_t row = 0; row < m; row += slab) {
      const int64_t count = std::min(slab, m - row);
      fill_activations(&worker, first, src, row, count, activations);
      run_mlp(&worker, p, activations, count, y + row * second.n * size_of(x_type), own);
    }
  });
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
