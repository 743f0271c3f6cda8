// linear: out[..., n] = sum over k of x[..., k] * w[n, k] + bias[n], w packed; the arithmetic is
// the weight's mode.
//
// Rows go in slabs: each is quantized (or widened) once into scratch, then its tiles x row blocks
// are shared among threads. Neither slabs nor blocks nor threads can change a result: an output
// depends on its row and tile alone.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "../isa/isa.h"
#include "check.h"
#include "parallel.h"
#include "scratch.h"

namespace slmops {
namespace {

constexpr char kOp[] = "linear";
constexpr int64_t kSlabBytes = 16 << 20;  // activations of a slab: bounds scratch for long prompts
constexpr int64_t kMostBlockRows = 256;   // a block's chunk of activations is in the L2 cache
constexpr int64_t kLeastBlockRows = 48;   // fewer would unpack a tile's weights for too little work
constexpr int64_t kPassRows = 4;          // row blocks are multiples of what fills the registers

/// Everything a call works with, checked.
struct Problem {
  Format f;
  SourceRows x;
  DType out_type;
  int64_t m;
  const void* bias = nullptr;
  DType bias_type = DType::f32;
  const uint8_t* packed;
  uint8_t* out;
};

bool is_int8(const Format& f) { return f.activations == Activations::int8; }

int64_t row_bytes(const Format& f) {
  return f.k_padded * (is_int8(f) ? 1 : int64_t{sizeof(float)});
}

/// The stride between rows of `x` seen as [m, k], or -1 where no single one fits.
int64_t row_stride(const Tensor& x, int64_t k) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  const int64_t last = x.dim() - 1;
  if (k > 1 && strides[last] != 1) return -1;
  int64_t stride = k, next = 0;  // `next`: what the stride of the next dimension outwards has to be
  bool first = true;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (first) {
      stride = strides[i];
      first = false;
    } else if (strides[i] != next) {
      return -1;
    }
    next = strides[i] * sizes[i];
  }
  return stride;
}

void check_perm(const Tensor& perm, int64_t k) {
  check_type(kOp, "perm", perm, ScalarType::Long);
  check_shape(kOp, "perm", perm, {k});
  const int64_t* p = static_cast<const int64_t*>(perm.const_data_ptr());
  uint64_t out_of_range = 0;
  for (int64_t i = 0; i < k; ++i)
    out_of_range |= static_cast<uint64_t>(p[i]) >= static_cast<uint64_t>(k);
  SLMOPS_CHECK(out_of_range == 0, kOp, ": expected perm to hold columns in 0..", k - 1,
               ", got one outside");
}

/// Quantizes or widens rows [row, row + rows) of x and returns where: one field group of `args` is
/// set.
void fill_rows(const Problem& p, const KernelTable& kernels, int64_t row, int64_t rows,
               Scratch* scratch, LinearArgs* args) {
  const Format& f = p.f;
  SourceRows src = p.x;
  src.x = static_cast<const uint8_t*>(src.x) + row * src.stride * size_of(src.type);
  const int64_t shares = share_count(rows, f.k_padded * 8);
  if (is_int8(f)) {
    const QuantizedRows quantized = {scratch->take<int8_t>(rows * f.k_padded),
                                     scratch->take<float>(rows * (f.k_padded / f.act_group)),
                                     scratch->take<int32_t>(rows * presets_per_row(f))};
    parallel(rows, shares, [&](int64_t, int64_t begin, int64_t end) {
      kernels.quantize_rows(f, src, quantized, begin, end);
    });
    args->rows = quantized;
  } else {
    float* widened = scratch->take<float>(rows * f.k_padded);
    parallel(rows, shares, [&](int64_t, int64_t begin, int64_t end) {
      kernels.widen_rows(f, src, widened, begin, end);
    });
    args->x = widened;
  }
}

int64_t activation_bytes(const Format& f, int64_t rows) {
  if (!is_int8(f)) return aligned_bytes(rows * row_bytes(f));
  return aligned_bytes(rows * f.k_padded) +
         aligned_bytes(rows * (f.k_padded / f.act_group) * int64_t{sizeof(float)}) +
         aligned_bytes(rows * presets_per_row(f) * int64_t{sizeof(int32_t)});
}

/// Rows of a block: few enough for a core's cache, and blocks enough for all threads.
int64_t block_rows(const Format& f, int64_t rows) {
  if (rows <= kLeastBlockRows) return rows;
  // Four items per thread keep the uneven end of their shares short.
  const int64_t wanted_items = 4 * int64_t{torch::stable::get_num_threads()};
  int64_t blocks = (rows + kMostBlockRows - 1) / kMostBlockRows;
  blocks =
      std::max(blocks, std::min((wanted_items + f.tiles - 1) / f.tiles, rows / kLeastBlockRows));
  const int64_t even = (rows + blocks - 1) / blocks;
  return (even + kPassRows - 1) / kPassRows * kPassRows;
}

void run_slab(const Problem& p, const KernelTable& kernels, int64_t row, int64_t rows) {
  const Format& f = p.f;
  const int64_t block = block_rows(f, rows);
  const int64_t items = f.tiles * ((rows + block - 1) / block);
  const int64_t shares = share_count(items, std::min(block, rows) * f.k_padded * kTile);
  const int64_t share_bytes = aligned_bytes(scratch_bytes(f, std::min(block, rows)));
  Scratch scratch(activation_bytes(f, rows) + shares * share_bytes);
  LinearArgs args = {.format = &f,
                     .packed = p.packed,
                     .rows = {},
                     .x = nullptr,
                     .bias = p.bias,
                     .bias_type = p.bias_type,
                     .out = p.out + row * f.n * size_of(p.out_type),
                     .out_type = p.out_type,
                     .out_stride = f.n,
                     .scratch = nullptr};
  fill_rows(p, kernels, row, rows, &scratch, &args);
  uint8_t* tile_scratch = scratch.take<uint8_t>(shares * share_bytes);
  parallel(items, shares, [&](int64_t share, int64_t begin, int64_t end) {
    LinearArgs mine = args;
    mine.scratch = tile_scratch + share * share_bytes;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / f.tiles * block;
      kernels.linear(mine, item % f.tiles, first, std::min(first + block, rows));
    }
  });
}

Tensor new_output(const Tensor& x, int64_t n, ScalarType type) {
  constexpr int64_t kMaxRank = 64;
  const int64_t rank = x.dim();
  SLMOPS_CHECK(rank <= kMaxRank, kOp, ": expected x of at most ", kMaxRank, " dimensions, got ",
               rank);
  int64_t sizes[kMaxRank];
  std::copy_n(x.sizes().data(), rank, sizes);
  sizes[rank - 1] = n;
  return new_tensor(sizes, rank, type);
}

Tensor linear(const Tensor& x, const Tensor& packed, int64_t out_features,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& perm,
              std::optional<ScalarType> out_dtype) {
  Problem p = {};
  p.f = packed_format(kOp, packed);
  const Format& f = p.f;
  SLMOPS_CHECK(out_features == f.n, kOp, ": expected out_features == ", f.n,
               " (n of the packed weight), got ", out_features);
  SLMOPS_CHECK(x.dim() >= 1, kOp, ": expected x with at least one dimension, got a scalar");
  SLMOPS_CHECK(last_size(x) == f.k, kOp, ": expected x.size(-1) == ", f.k,
               " (k of the packed weight), got ", last_size(x));
  const ScalarType x_type = x.scalar_type();
  p.x.type = float_type(kOp, "x", x_type);
  p.out_type = float_type(kOp, "out_dtype", out_dtype.value_or(x_type));

  Tensor out = new_output(x, f.n, out_dtype.value_or(x_type));
  p.m = x.numel() / f.k;
  // Owners of copies, where x, bias or perm must be contiguous and are not.
  std::optional<Tensor> x_copy, bias_copy, perm_copy;
  p.x.stride = row_stride(x, f.k);
  if (p.x.stride < 0) {
    x_copy = torch::stable::contiguous(x);
    p.x.stride = f.k;
  }
  p.x.x = x_copy ? x_copy->const_data_ptr() : x.const_data_ptr();
  if (bias.has_value()) {
    check_shape(kOp, "bias", *bias, {f.n});
    p.bias_type = float_type(kOp, "bias", bias->scalar_type());
    bias_copy = to_contiguous(*bias);
    p.bias = bias_copy->const_data_ptr();
  }
  p.x.perm = nullptr;
  if (perm.has_value()) {
    perm_copy = to_contiguous(*perm);
    check_perm(*perm_copy, f.k);
    p.x.perm = static_cast<const int64_t*>(perm_copy->const_data_ptr());
  }
  p.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  p.out = static_cast<uint8_t*>(out.mutable_data_ptr());

  const KernelTable& table = kernels();
  const int64_t slab =
      std::max<int64_t>(kPassRows, kSlabBytes / row_bytes(f) / kPassRows * kPassRows);
  for (int64_t row = 0; row < p.m; row += slab) {
    run_slab(p, table, row, std::min(slab, p.m - row));
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def(
      "linear(Tensor x, Tensor packed, int out_features, Tensor? bias=None, Tensor? perm=None, "
      "ScalarType? out_dtype=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace slmops
