// qkv_rotary: q, k, v = x w^T + bias, then norm and rotary embedding of q and k; fp32 until the one
// rounding at the end.
#include "qkv_rotary.h"

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "library.h"
#include "parallel.h"
#include "rows.h"

namespace slmops {
namespace {

constexpr char kOp[] = "qkv_rotary";

// Columns of a unit of many rows: heads side by side share the angles of a row while they are in
// the first-level cache.
constexpr int64_t kWideUnit = 256;
constexpr int64_t kManyRows = 64;
constexpr int64_t kUnitsPerWorker = 4;

/// The least number of tiles that holds whole heads, or for many rows a multiple.
int64_t unit_tiles(const Qkv& p, int64_t rows, int64_t workers) {
  int64_t tiles = std::lcm(p.heads.d, kTile) / kTile;
  const auto fits = [&](int64_t wider) {
    return wider * kTile <= kWideUnit && p.f.tiles >= wider * kUnitsPerWorker * workers;
  };
  while (rows >= kManyRows && fits(2 * tiles)) tiles *= 2;
  return tiles;
}

/// Units of whole heads, each finished as soon as it is computed.
void run_by_units(Worker* worker, const Qkv& p, const SlabActivations& x, int64_t row, int64_t rows,
                  const QkvScratch& scratch) {
  const Format& f = p.f;
  const int64_t d = p.heads.d, tiles = scratch.tiles, width = tiles * kTile;
  LinearArgs args = linear_args(f, p.packed, x);
  args.bias = p.bias;
  args.bias_type = p.bias_type;
  args.scratch = scratch.product.of(worker->index());
  float* outputs = reinterpret_cast<float*>(scratch.unit.of(worker->index()));
  args.out = outputs;
  args.out_stride = width;
  const KernelTable& table = worker->table();
  const Cut cut((f.tiles + tiles - 1) / tiles, rows, worker->size());
  share_cut(worker, cut, [&](int64_t unit, int64_t first, int64_t last) {
    args.first_row = first;
    args.first_output = unit * width;
    const int64_t end = std::min((unit + 1) * tiles, f.tiles);
    for (int64_t tile = unit * tiles; tile < end; ++tile)
      run_tile(*worker, args, tile, first, last);
    const int64_t head = unit * width / d, count = std::min(width, f.n - unit * width) / d;
    table.heads(p.heads, outputs, width, row + first, last - first, head, count);
  });
}

/// All outputs of a row, then its heads.
void run_by_rows(Worker* worker, const Qkv& p, const SlabActivations& x, int64_t row, int64_t rows,
                 const QkvScratch& scratch) {
  const Format& f = p.f;
  float* outputs = scratch.rows;
  run_product(worker, {.f = f,
                       .packed = p.packed,
                       .x = x,
                       .rows = rows,
                       .bias = p.bias,
                       .bias_type = p.bias_type,
                       .out = outputs,
                       .out_type = DType::f32,
                       .scratch = scratch.product});
  worker->share(rows, [&](int64_t begin, int64_t end) {
    worker->table().heads(p.heads, outputs + begin * f.n, f.n, row + begin, end - begin, 0,
                          f.n / p.heads.d);
  });
}

}  // namespace

QkvScratch::QkvScratch(const Qkv& p, int64_t slab, int64_t workers, Scratch* scratch)
    : product(scratch->take_each(workers, product_bytes(p.f, slab))),
      unit{},
      rows(nullptr),
      tiles(unit_tiles(p, slab, workers)) {
  if (p.by_rows()) {
    rows = scratch->take<float>(slab * p.f.n);
  } else {
    const int64_t width = tiles * kTile;
    unit = scratch->take_each(workers, most_block_rows(slab) * width * int64_t{sizeof(float)});
  }
}

void run_qkv(Worker* worker, const Qkv& p, const SlabActivations& x, int64_t row, int64_t rows,
             const QkvScratch& scratch) {
  if (p.by_rows()) {
    run_by_rows(worker, p, x, row, rows, scratch);
  } else {
    run_by_units(worker, p, x, row, rows, scratch);
  }
}

HeadNorm::HeadNorm(const char* op, const char* argument, const std::optional<Tensor>& weight,
                   int64_t heads, int64_t d, double eps, double offset) {
  if (!weight.has_value()) return;
  SLMOPS_CHECK(weight->dim() == 1 && (weight->size(0) == d || weight->size(0) == heads * d), op,
               ": expected ", argument, " of shape (", d, ",) (a head's) or (", heads * d,
               ",) (all heads'), got ", shape(*weight));
  owner = to_contiguous(*weight);
  width = weight->size(0);
  norm = {.weight = owner->const_data_ptr(),
          .type = float_type(op, argument, weight->scalar_type()),
          .eps = static_cast<float>(eps),
          .offset = static_cast<float>(offset),
          .cast = DType::f32};
}

namespace {

/// The same through torch's product, a slab of rows at a time.
void library_qkv(const Tensor& x, const Qkv& p, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& perm) {
  const KernelTable& table = kernels();
  const Tensor rows = torch::stable::reshape(x, {-1, p.f.k});
  const int64_t slab = library_slab_rows(p.f.n * int64_t{sizeof(float)});
  for (int64_t row = 0; row < rows.size(0); row += slab) {
    Tensor part = rows;
    const int64_t count = std::min(slab, rows.size(0) - row);
    part = torch::stable::narrow(part, 0, row, count);
    Tensor y = library_linear(part, p.f, p.packed, bias, perm, ScalarType::Float);
    float* outputs = static_cast<float*>(y.mutable_data_ptr());
    parallel(count, share_count(count, p.f.n * 4), [&](int64_t, int64_t begin, int64_t end) {
      table.heads(p.heads, outputs + begin * p.f.n, p.f.n, row + begin, end - begin, 0,
                  p.f.n / p.heads.d);
    });
  }
}

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
  const HeadNorm q(kOp, "q_norm", q_norm, heads[0], head_dim, eps, offset);
  const HeadNorm k(kOp, "k_norm", k_norm, heads[1], head_dim, eps, offset);
  const RotaryTables tables(kOp, cos, sin, x.size(0), x.size(1), head_dim);
  const Rows rows(x);
  const ScalarType type = x.scalar_type();
  const auto new_heads = [&](int64_t count) {
    return new_tensor({x.size(0), x.size(1), count, head_dim}, type);
  };
  Tensor out[3] = {new_heads(heads[0]), new_heads(heads[1]), new_heads(heads[2])};
  const auto whole = [&](int i) -> HeadsOut {
    const int64_t row = heads[i] * head_dim;
    return {out[i].mutable_data_ptr(), x.size(1) * row, row, head_dim};
  };
  const DType x_type = float_type(kOp, "x", type);
  const Qkv p = {.f = f,
                 .packed = static_cast<const uint8_t*>(packed.const_data_ptr()),
                 .bias = checked_bias.data(),
                 .bias_type = checked_bias.type,
                 .heads = {.heads = {heads[0], heads[1], heads[2]},
                           .d = head_dim,
                           .out = {whole(0), whole(1), whole(2)},
                           .type = x_type,
                           .norm = {q.norm, k.norm},
                           .norm_width = {q.width, k.width},
                           .length = x.size(1),
                           .cos = tables.cos(),
                           .sin = tables.sin(),
                           .angle_type = tables.type(),
                           .angle_batch_stride = tables.batch_stride(),
                           .r = tables.r(),
                           .interleaved = interleaved}};
  const SourceRows src = {rows.data(), x_type, rows.stride(), columns.data()};
  const int64_t m = x.size(0) * x.size(1), slab = std::min(m, p.slab_rows());
  if (m == 0) return {out[0], out[1], out[2]};
  if (by_library(f, m)) {
    library_qkv(x, p, bias, perm);
    return {out[0], out[1], out[2]};
  }
  const int64_t workers = Team::size_for(m * f.k_padded * f.n, m);
  Scratch scratch;
  const SlabActivations activations = take_activations(f, slab, &scratch);
  const QkvScratch own(p, slab, workers, &scratch);
  Team::run(workers, [&](Worker& worker) {
    for (int64_t row = 0; row < m; row += slab) {
      const int64_t count = std::min(slab, m - row);
      fill_activations(&worker, f, src, row, count, activations);
      run_qkv(&worker, p, activations, row, count, own);
    }
  });
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
