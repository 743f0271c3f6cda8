// qkv_rotary: q, k, v = x w^T + bias, then norm and rotary embedding of q and k; fp32 until the one
// rounding at the end.
//
// A unit is the least number of tiles that holds whole heads: its outputs go to fp32 scratch, from
// which its heads are finished. A norm over the whole width of q or k needs all of a row first.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "matmul.h"
#include "rotary_tables.h"
#include "rows.h"

namespace slmops {
namespace {

constexpr char kOp[] = "qkv_rotary";
constexpr int64_t kHeadCost = 8;  // multiply-adds that an element of a head is worth

/// A call, checked.
struct Problem {
  const Format& f;
  SourceRows x;
  const uint8_t* packed;
  const Bias& bias;
  HeadsArgs heads;
  bool by_rows;  // a norm wants all of a row
};

/// Units of whole heads, each finished as soon as it is computed.
void run_by_units(const Problem& p, const SlabActivations& x, int64_t row, int64_t rows) {
  const Format& f = p.f;
  const int64_t d = p.heads.d, tiles = std::lcm(d, kTile) / kTile, width = tiles * kTile;
  const Cut cut = cut_work((f.tiles + tiles - 1) / tiles, rows, f.k_padded * width);
  const int64_t linear_bytes = aligned_bytes(scratch_bytes(f, cut.block));
  const int64_t share_bytes =
      linear_bytes + aligned_bytes(cut.block * width * int64_t{sizeof(float)});
  Scratch scratch(cut.shares * share_bytes);
  uint8_t* shares = scratch.take<uint8_t>(cut.shares * share_bytes);
  LinearArgs args = linear_args(f, p.packed, x);
  args.bias = p.bias.data();
  args.bias_type = p.bias.type;
  const KernelTable& table = kernels();
  run_cut(cut, [&](int64_t share, int64_t unit, int64_t first, int64_t last) {
    LinearArgs mine = args;
    mine.scratch = shares + share * share_bytes;
    float* outputs = reinterpret_cast<float*>(mine.scratch + linear_bytes);
    mine.out = outputs;
    mine.out_stride = width;
    mine.first_row = first;
    mine.first_output = unit * width;
    const int64_t end = std::min((unit + 1) * tiles, f.tiles);
    for (int64_t tile = unit * tiles; tile < end; ++tile) table.linear(mine, tile, first, last);
    const int64_t head = unit * width / d, count = std::min(width, f.n - unit * width) / d;
    table.heads(p.heads, outputs, width, row + first, last - first, head, count);
  });
}

/// All outputs of a row, then its heads.
void run_by_rows(const Problem& p, const SlabActivations& x, int64_t row, int64_t rows) {
  const Format& f = p.f;
  Scratch scratch(aligned_bytes(rows * f.n * int64_t{sizeof(float)}));
  float* outputs = scratch.take<float>(rows * f.n);
  run_product({.f = f,
               .packed = p.packed,
               .x = x,
               .rows = rows,
               .bias = p.bias.data(),
               .bias_type = p.bias.type,
               .out = outputs,
               .out_type = DType::f32});
  const KernelTable& table = kernels();
  parallel(rows, share_count(rows, f.n * kHeadCost), [&](int64_t, int64_t begin, int64_t end) {
    table.heads(p.heads, outputs + begin * f.n, f.n, row + begin, end - begin, 0, f.n / p.heads.d);
  });
}

void run_slab(const Problem& p, int64_t row, int64_t rows) {
  Scratch scratch(activation_bytes(p.f, rows));
  const SlabActivations x = take_activations(p.f, rows, &scratch);
  fill_activations(p.f, p.x, row, rows, x);
  if (p.by_rows) {
    run_by_rows(p, x, row, rows);
  } else {
    run_by_units(p, x, row, rows);
  }
}

/// A norm of q or k: absent, over each head, or over all heads together.
struct HeadNorm {
  HeadNorm(const char* argument, const std::optional<Tensor>& weight, int64_t heads, int64_t d,
           double eps, double offset) {
    if (!weight.has_value()) return;
    SLMOPS_CHECK(weight->dim() == 1 && (weight->size(0) == d || weight->size(0) == heads * d), kOp,
                 ": expected ", argument, " of shape (", d, ",) (a head's) or (", heads * d,
                 ",) (all heads'), got ", shape(*weight));
    owner = to_contiguous(*weight);
    width = weight->size(0);
    norm = {.weight = owner->const_data_ptr(),
            .type = float_type(kOp, argument, weight->scalar_type()),
            .eps = static_cast<float>(eps),
            .offset = static_cast<float>(offset),
            .cast = DType::f32};
  }

  std::optional<Tensor> owner;
  NormWeight norm = {};
  int64_t width = 0;
};

std::tuple<Tensor, Tensor, Tensor> qkv_rotary(const Tensor& x, const Tensor& packed,
                                              const std::vector<int64_t>& heads, int64_t head_dim,
                                              const std::optional<Tensor>& bias,
                                              const std::optional<Tensor>& q_norm,
                                              const std::optional<Tensor>& k_norm, double eps,
                                              double offset, const std::optional<Tensor>& cos,
                                              const std::optional<Tensor>& sin, bool interleaved,
                                              const std::optional<Tensor>& perm) {
  SLMOPS_CHECK(x.dim() == 3, kOp, ": expected x of shape (batch, length, k), got ", shape(x));
  SLMOPS_CHECK(heads.size() == 3 && heads[0] > 0 && heads[1] >= 0 && heads[2] >= 0 && head_dim > 0,
               kOp, ": expected three numbers of heads (q, k, v) and a positive head_dim");
  const Format f = weight_format(kOp, "packed", packed, (heads[0] + heads[1] + heads[2]) * head_dim,
                                 "the sum of heads_q_k_v times head_dim", x);
  const Bias checked_bias(kOp, "bias", bias, f.n);
  const Permutation columns(kOp, perm, f.k);
  const HeadNorm q("q_norm", q_norm, heads[0], head_dim, eps, offset);
  const HeadNorm k("k_norm", k_norm, heads[1], head_dim, eps, offset);
  const RotaryTables tables(kOp, cos, sin, x.size(0), x.size(1), head_dim);
  const Rows rows(x);
  const ScalarType type = x.scalar_type();
  const auto new_heads = [&](int64_t count) {
    return new_tensor({x.size(0), x.size(1), count, head_dim}, type);
  };
  Tensor out[3] = {new_heads(heads[0]), new_heads(heads[1]), new_heads(heads[2])};
  const DType x_type = float_type(kOp, "x", type);
  const Problem p = {.f = f,
                     .x = {rows.data(), x_type, rows.stride(), columns.data()},
                     .packed = static_cast<const uint8_t*>(packed.const_data_ptr()),
                     .bias = checked_bias,
                     .heads = {.heads = {heads[0], heads[1], heads[2]},
                               .d = head_dim,
                               .out = {out[0].mutable_data_ptr(), out[1].mutable_data_ptr(),
                                       out[2].mutable_data_ptr()},
                               .type = x_type,
                               .norm = {q.norm, k.norm},
                               .norm_width = {q.width, k.width},
                               .length = x.size(1),
                               .cos = tables.cos(),
                               .sin = tables.sin(),
                               .angle_type = tables.type(),
                               .angle_batch_stride = tables.batch_stride(),
                               .r = tables.r(),
                               .interleaved = interleaved},
                     .by_rows = std::max(q.width, k.width) > head_dim};
  const int64_t m = x.size(0) * x.size(1);
  const int64_t wide = p.by_rows ? f.n * 4 : 0;
  const int64_t slab = slab_rows(row_bytes(f) + wide);
  for (int64_t row = 0; row < m; row += slab) run_slab(p, row, std::min(slab, m - row));
  return {out[0], out[1], out[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def(
      "qkv_rotary(Tensor x, Tensor packed, int[] heads_q_k_v, int head_dim, Tensor? bias, Tensor? "
      "q_norm, Tensor? k_norm, float eps, float offset, Tensor? cos, Tensor? sin, bool "
      "interleaved, Tensor? perm=None) -> (Tensor q, Tensor k, Tensor v)");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("qkv_rotary", TORCH_BOX(&qkv_rotary)); }

}  // namespace slmops
