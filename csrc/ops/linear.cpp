// linear: out[..., n] = sum over k of x[..., k] * w[n, k] + bias[n], w packed; the arithmetic is
// the weight's mode.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "matmul.h"
#include "rows.h"

namespace slmops {
namespace {

constexpr char kOp[] = "linear";

/// Everything a call works with, checked.
struct Problem {
  const Format& f;
  SourceRows x;
  const uint8_t* packed;
  const Bias& bias;
  uint8_t* out;
  DType out_type;
};

void run_slab(const Problem& p, int64_t row, int64_t rows) {
  const Format& f = p.f;
  Scratch scratch(activation_bytes(f, rows));
  const SlabActivations x = take_activations(f, rows, &scratch);
  fill_activations(f, p.x, row, rows, x);
  run_product({.f = f,
               .packed = p.packed,
               .x = x,
               .rows = rows,
               .bias = p.bias.data(),
               .bias_type = p.bias.type,
               .out = p.out + row * f.n * size_of(p.out_type),
               .out_type = p.out_type});
}

Tensor linear(const Tensor& x, const Tensor& packed, int64_t out_features,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& perm,
              std::optional<ScalarType> out_dtype) {
  const Format f = weight_format(kOp, "packed", packed, out_features, "out_features", x);
  const ScalarType out_type = out_dtype.value_or(x.scalar_type());
  const Bias checked_bias(kOp, "bias", bias, f.n);
  const Permutation columns(kOp, perm, f.k);
  const DType x_type = float_type(kOp, "x", x.scalar_type());
  const DType y_type = float_type(kOp, "out_dtype", out_type);
  const Rows rows(x);
  Tensor out = new_rows(x, f.n, out_type);
  const Problem p = {.f = f,
                     .x = {rows.data(), x_type, rows.stride(), columns.data()},
                     .packed = static_cast<const uint8_t*>(packed.const_data_ptr()),
                     .bias = checked_bias,
                     .out = static_cast<uint8_t*>(out.mutable_data_ptr()),
                     .out_type = y_type};
  const int64_t m = x.numel() / f.k, slab = slab_rows(row_bytes(f));
  for (int64_t row = 0; row < m; row += slab) run_slab(p, row, std::min(slab, m - row));
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
