// rotary: heads of x [B, L, H, D] turned by the angles of their positions, given as cos and sin.
#include <torch/csrc/stable/library.h>

#include "../isa/isa.h"
#include "check.h"
#include "parallel.h"

namespace slmops {
namespace {

constexpr char kOp[] = "rotary";
constexpr int64_t kCost = 2;  // multiply-adds that an element is worth

/// Checks one of the tables against x.
void check_table(const char* argument, const Tensor& table, const Tensor& x) {
  SLMOPS_CHECK(table.dim() == 3 && (table.size(0) == 1 || table.size(0) == x.size(0)) &&
                   table.size(1) == x.size(1),
               kOp, ": expected ", argument, " of shape (", x.size(0), " or 1, ", x.size(1),
               ", R) for x of shape ", shape(x), ", got ", shape(table));
  const int64_t r = table.size(2);
  SLMOPS_CHECK(r % 2 == 0 && r <= x.size(3), kOp, ": expected ", argument,
               " with an even last size of at most ", x.size(3), " (the head's), got ", r);
}

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  SLMOPS_CHECK(x.dim() == 4, kOp, ": expected x of shape (batch, length, heads, head_dim), got ",
               shape(x));
  check_table("cos", cos, x);
  check_table("sin", sin, x);
  SLMOPS_CHECK(cos.scalar_type() == sin.scalar_type() && cos.size(0) == sin.size(0) &&
                   cos.size(2) == sin.size(2),
               kOp, ": expected cos and sin of one shape and dtype, got ", shape(cos), " ",
               name(cos.scalar_type()), " and ", shape(sin), " ", name(sin.scalar_type()));
  const Tensor in = x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
  const Tensor cosines = to_contiguous(cos), sines = to_contiguous(sin);
  Tensor out = new_tensor(x.sizes().data(), x.dim(), x.scalar_type());
  const int64_t length = x.size(1), heads = x.size(2), d = x.size(3), r = cos.size(2);
  const RotaryArgs args = {.x = in.const_data_ptr(),
                           .type = float_type(kOp, "x", x.scalar_type()),
                           .batch_stride = in.stride(0),
                           .length_stride = in.stride(1),
                           .head_stride = in.stride(2),
                           .length = length,
                           .heads = heads,
                           .d = d,
                           .cos = cosines.const_data_ptr(),
                           .sin = sines.const_data_ptr(),
                           .angle_type = float_type(kOp, "cos", cos.scalar_type()),
                           .angle_batch_stride = cos.size(0) == 1 ? 0 : length * r,
                           .r = r,
                           .interleaved = interleaved,
                           .out = out.mutable_data_ptr()};
  const int64_t items = x.size(0) * length * heads;
  const KernelTable& table = kernels();
  parallel(items, share_count(items, kCost * d),
           [&](int64_t, int64_t begin, int64_t end) { table.rotary(args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("rotary", TORCH_BOX(&rotary)); }

}  // namespace slmops
