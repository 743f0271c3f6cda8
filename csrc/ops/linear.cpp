// linear: out[..., n] = sum over k of x[..., k] * w[n, k] + bias[n], w packed; the arithmetic is
// the weight's mode.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "library.h"
#include "matmul.h"
#include "rows.h"

namespace slmops {
namespace {

constexpr char kOp[] = "linear";

Tensor linear(const Tensor& x, const Tensor& packed, int64_t out_features,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& perm,
              std::optional<ScalarType> out_dtype) {
  const Format f = weight_format(kOp, "packed", packed, out_features, "out_features", x);
  const ScalarType out_type = out_dtype.value_or(x.scalar_type());
  const Bias checked_bias(kOp, "bias", bias, f.n);
  const Permutation columns(kOp, perm, f.k);
  const DType x_type = float_type(kOp, "x", x.scalar_type());
  const DType y_type = float_type(kOp, "out_dtype", out_type);
  const int64_t m = x.numel() / f.k, slab = std::min(m, slab_rows(row_bytes(f)));
  if (by_library(f, m)) {
    return library_linear(x, f, static_cast<const uint8_t*>(packed.const_data_ptr()),
                          checked_bias.owner, perm, out_type);
  }
  const Rows rows(x);
  Tensor out = new_rows(x, f.n, out_type);
  const SourceRows src = {rows.data(), x_type, rows.stride(), columns.data()};
  uint8_t* y = static_cast<uint8_t*>(out.mutable_data_ptr());
  if (m == 0) return out;
  const int64_t workers = Team::size_for(m * f.k_padded * f.tiles * kTile, m);
  Scratch scratch;
  const SlabActivations activations = take_activations(f, slab, &scratch);
  const WorkerScratch own = scratch.take_each(workers, product_bytes(f, slab));
  Team::run(workers, [&](Worker& worker) {
    for (int64_t row = 0; row < m; row += slab) {
      const int64_t count = std::min(slab, m - row);
      fill_activations(&worker, f, src, row, count, activations);
      run_product(&worker, {.f = f,
                            .packed = static_cast<const uint8_t*>(packed.const_data_ptr()),
                            .x = activations,
                            .rows = count,
                            .bias = checked_bias.data(),
                            .bias_type = checked_bias.type,
                            .out = y + row * f.n * size_of(y_type),
                            .out_type = y_type,
                            .scratch = own});
    }
  });
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
