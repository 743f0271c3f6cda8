// The cos and sin of positions, [batch or 1, length, r] each: checked, contiguous, or absent.
#pragma once
#include <optional>

#include "check.h"

namespace slmops {

/// Owns what it points into.
class RotaryTables {
 public:
  RotaryTables(const char* op, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
               int64_t batch, int64_t length, int64_t head_dim) {
    SLMOPS_CHECK(cos.has_value() == sin.has_value(), op,
                 ": expected cos and sin both or none, got one");
    if (!cos.has_value()) return;
    check(op, "cos", *cos, batch, length, head_dim);
    check(op, "sin", *sin, batch, length, head_dim);
    SLMOPS_CHECK(cos->scalar_type() == sin->scalar_type() && cos->size(0) == sin->size(0) &&
                     cos->size(2) == sin->size(2),
                 op, ": expected cos and sin of one shape and dtype, got ", shape(*cos), " ",
                 name(cos->scalar_type()), " and ", shape(*sin), " ", name(sin->scalar_type()));
    type_ = float_type(op, "cos", cos->scalar_type());
    cos_ = to_contiguous(*cos);
    sin_ = to_contiguous(*sin);
  }

  const void* cos() const { return cos_ ? cos_->const_data_ptr() : nullptr; }
  const void* sin() const { return sin_ ? sin_->const_data_ptr() : nullptr; }
  DType type() const { return type_; }
  /// Elements of a position's angles; 0 where there are none.
  int64_t r() const { return cos_ ? cos_->size(2) : 0; }
  /// Elements between sequences; 0 where all share the angles.
  int64_t batch_stride() const {
    return !cos_ || cos_->size(0) == 1 ? 0 : cos_->size(1) * cos_->size(2);
  }

 private:
  static void check(const char* op, const char* argument, const Tensor& table, int64_t batch,
                    int64_t length, int64_t head_dim) {
    SLMOPS_CHECK(table.dim() == 3 && (table.size(0) == 1 || table.size(0) == batch) &&
                     table.size(1) == length,
                 op, ": expected ", argument, " of shape (", batch, " or 1, ", length,
                 ", R) beside x of batch ", batch, " and length ", length, ", got ", shape(table));
    const int64_t r = table.size(2);
    SLMOPS_CHECK(r % 2 == 0 && r <= head_dim, op, ": expected ", argument,
                 " with an even last size of at most ", head_dim, " (the head's), got ", r);
  }

  std::optional<Tensor> cos_, sin_;
  DType type_ = DType::f32;
};

}  // namespace slmops
