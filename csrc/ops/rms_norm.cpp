// rms_norm: y = x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, and
// add_rms_norm: the same of sum = x + residual, which it returns too.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../isa/isa.h"
#include "check.h"
#include "parallel.h"
#include "rows.h"

namespace slmops {
namespace {

constexpr int64_t kCost = 2;  // multiply-adds that an element of a row is worth

const Tensor& with_dimension(const char* op, const Tensor& x) {
  SLMOPS_CHECK(x.dim() >= 1, op, ": expected x with at least one dimension, got a scalar");
  return x;
}

/// The checked arguments of a call and the owners of what they point into.
struct Norm {
  Norm(const char* op, const Tensor& x, const Tensor& weight, double eps, double offset,
       bool cast_before_weight, ScalarType out_type)
      : rows(with_dimension(op, x)), weights(to_contiguous(weight)) {
    const int64_t k = last_size(x);
    check_shape(op, "weight", weight, {k});
    const DType type = float_type(op, "x", x.scalar_type());
    args = {.norm = {.weight = weights.const_data_ptr(),
                     .type = float_type(op, "weight", weight.scalar_type()),
                     .eps = static_cast<float>(eps),
                     .offset = static_cast<float>(offset),
                     .cast = cast_before_weight ? type : DType::f32},
            .x = rows.data(),
            .type = type,
            .stride = rows.stride(),
            .out = nullptr,
            .out_type = float_type(op, "out_dtype", out_type),
            .k = k};
    count = k == 0 ? 0 : x.numel() / k;
  }

  Rows rows;
  Tensor weights;
  NormArgs args;
  int64_t count;
};

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset,
                bool cast_before_weight, std::optional<ScalarType> out_dtype) {
  const ScalarType out_type = out_dtype.value_or(x.scalar_type());
  Norm norm("rms_norm", x, weight, eps, offset, cast_before_weight, out_type);
  Tensor out = new_tensor(x.sizes().data(), x.dim(), out_type);
  norm.args.out = out.mutable_data_ptr();
  const KernelTable& table = kernels();
  parallel(norm.count, share_count(norm.count, kCost * norm.args.k),
           [&](int64_t, int64_t begin, int64_t end) { table.rms_norm(norm.args, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps, double offset,
                                        bool cast_before_weight,
                                        std::optional<ScalarType> out_dtype) {
  constexpr char kOp[] = "add_rms_norm";
  const ScalarType out_type = out_dtype.value_or(x.scalar_type());
  Norm norm(kOp, x, weight, eps, offset, cast_before_weight, out_type);
  check_type(kOp, "residual", residual, x.scalar_type());
  const auto sizes = x.sizes(), others = residual.sizes();
  SLMOPS_CHECK(std::equal(sizes.begin(), sizes.end(), others.begin(), others.end()), kOp,
               ": expected residual of shape ", shape(x), ", got ", shape(residual));
  const Rows residuals(residual);
  Tensor out = new_tensor(sizes.data(), x.dim(), out_type);
  Tensor sum = new_tensor(sizes.data(), x.dim(), x.scalar_type());
  norm.args.out = out.mutable_data_ptr();
  const AddNormArgs args = {.norm = norm.args,
                            .residual = residuals.data(),
                            .residual_stride = residuals.stride(),
                            .sum = sum.mutable_data_ptr()};
  const KernelTable& table = kernels();
  parallel(norm.count, share_count(norm.count, kCost * norm.args.k),
           [&](int64_t, int64_t begin, int64_t end) { table.add_rms_norm(args, begin, end); });
  return {out, sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def(
      "rms_norm(Tensor x, Tensor weight, float eps, float offset, bool cast_before_weight, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset, bool "
      "cast_before_weight, ScalarType? out_dtype=None) -> (Tensor normed, Tensor sum)");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
}

}  // namespace slmops
