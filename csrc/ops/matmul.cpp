// Activations of a slab, the cut of its work, and the checks of what comes with a packed weight.
#include "matmul.h"

namespace slmops {
namespace {

constexpr int64_t kSlabBytes = 16 << 20;
constexpr int64_t kMostBlockRows = 256;  // a block's chunk of activations is in the L2 cache
constexpr int64_t kLeastBlockRows = 48;  // fewer would unpack a tile's weights for too little work

}  // namespace

int64_t slab_rows(int64_t row_bytes) {
  return std::max<int64_t>(kCodeRows, kSlabBytes / row_bytes / kCodeRows * kCodeRows);
}

SlabActivations take_activations(const Format& f, int64_t rows, Scratch* scratch) {
  if (is_fast(f)) {  // what of them is used is for the worker's row to say
    return {{},
            scratch->take<float>(rows * f.k_padded),
            {scratch->take<uint16_t>(rows * f.k_padded),
             scratch->take<float>(rows * (f.k_padded / f.group))}};
  }
  if (!is_int8(f)) return {{}, scratch->take<float>(rows * f.k_padded), {}};
  const int64_t blocks = code_block_bytes(f, rows);
  return {{scratch->take<int8_t>(rows * f.k_padded),
           scratch->take<float>(rows * (f.k_padded / f.act_group)),
           scratch->take<int32_t>(rows * presets_per_row(f)),
           blocks == 0 ? nullptr : scratch->take<int8_t>(blocks)},
          nullptr,
          {}};
}

void fill_rows(const Worker& worker, const Format& f, const SourceRows& src,
               const SlabActivations& out, int64_t begin, int64_t end) {
  if (is_int8(f)) {
    worker.table().quantize_rows(f, src, out.quantized, begin, end);
  } else if (uses_pairs(worker, f)) {
    worker.fast()->round_rows(f, src, out.pairs, begin, end);
  } else {
    worker.table().widen_rows(f, src, out.wide, begin, end);
  }
}

void fill_activations(Worker* worker, const Format& f, const SourceRows& src, int64_t row,
                      int64_t rows, const SlabActivations& out) {
  const SourceRows slab = rows_from(src, row);
  worker->share(rows,
                [&](int64_t begin, int64_t end) { fill_rows(*worker, f, slab, out, begin, end); });
}

LinearArgs linear_args(const Format& f, const uint8_t* packed, const SlabActivations& x) {
  return {.format = &f,
          .packed = packed,
          .rows = x.quantized,
          .x = x.wide,
          .pairs = x.pairs,
          .bias = nullptr,
          .bias_type = DType::f32,
          .out = nullptr,
          .out_type = DType::f32,
          .out_stride = 0,
          .first_row = 0,
          .first_output = 0,
          .scratch = nullptr,
          .read_ahead = tuned_read_ahead.load(std::memory_order_relaxed)};
}

int64_t most_block_rows(int64_t rows) { return std::min(rows, kMostBlockRows); }

Cut::Cut(int64_t units, int64_t rows, int64_t workers) : units(units), rows(rows), block(rows) {
  if (rows <= kLeastBlockRows) return;
  // Four items per worker keep the uneven end of their work short.
  int64_t blocks = (rows + kMostBlockRows - 1) / kMostBlockRows;
  blocks = std::max(blocks, std::min((4 * workers + units - 1) / units, rows / kLeastBlockRows));
  const int64_t even = (rows + blocks - 1) / blocks;
  block = (even + kCodeRows - 1) / kCodeRows * kCodeRows;
}

int64_t product_bytes(const Format& f, int64_t rows) {
  return scratch_bytes(f, most_block_rows(rows));
}

void run_product(Worker* worker, const Product& p) {
  const Format& f = p.f;
  LinearArgs args = linear_args(f, p.packed, p.x);
  args.bias = p.bias;
  args.bias_type = p.bias_type;
  args.out = p.out;
  args.out_type = p.out_type;
  args.out_stride = f.n;
  args.scratch = p.scratch.of(worker->index());
  share_cut(worker, Cut(f.tiles, p.rows, worker->size()),
            [&](int64_t tile, int64_t first, int64_t last) {
              run_tile(*worker, args, tile, first, last);
            });
}

Format weight_format(const char* op, const char* argument, const Tensor& packed, int64_t n,
                     const char* what, const Tensor& x) {
  const Format f = packed_format(op, packed);
  SLMOPS_CHECK(f.n == n, op, ": expected ", what, " == ", f.n, " (n of the packed weight ",
               argument, "), got ", n);
  SLMOPS_CHECK(x.dim() >= 1, op, ": expected x with at least one dimension, got a scalar");
  SLMOPS_CHECK(last_size(x) == f.k, op, ": expected x.size(-1) == ", f.k,
               " (k of the packed weight ", argument, "), got ", last_size(x));
  return f;
}

Bias::Bias(const char* op, const char* argument, const std::optional<Tensor>& bias, int64_t n) {
  if (!bias.has_value()) return;
  check_shape(op, argument, *bias, {n});
  type = float_type(op, argument, bias->scalar_type());
  owner = to_contiguous(*bias);
}

Permutation::Permutation(const char* op, const std::optional<Tensor>& perm, int64_t k) {
  if (!perm.has_value()) return;
  check_type(op, "perm", *perm, ScalarType::Long);
  check_shape(op, "perm", *perm, {k});
  owner = to_contiguous(*perm);
  uint64_t out_of_range = 0;
  for (int64_t i = 0; i < k; ++i) {
    out_of_range |= static_cast<uint64_t>(data()[i]) >= static_cast<uint64_t>(k);
  }
  SLMOPS_CHECK(out_of_range == 0, op, ": expected perm to hold columns in 0..", k - 1,
               ", got one outside");
}

}  // namespace slmops
