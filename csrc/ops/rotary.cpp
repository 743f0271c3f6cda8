// rotary: heads of x [B, L, H, D] turned by the angles of their positions, given as cos and sin.
#include <torch/csrc/stable/library.h>

#include "../isa/isa.h"
#include "check.h"
#include "parallel.h"
#include "rotary_tables.h"

namespace slmops {
namespace {

constexpr char kOp[] = "rotary";
constexpr int64_t kCost = 2;  // multiply-adds that an element is worth

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  SLMOPS_CHECK(x.dim() == 4, kOp, ": expected x of shape (batch, length, heads, head_dim), got ",
               shape(x));
  const RotaryTables tables(kOp, cos, sin, x.size(0), x.size(1), x.size(3));
  const Tensor in = x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
  Tensor out = new_tensor(x.sizes().data(), x.dim(), x.scalar_type());
  const int64_t length = x.size(1), heads = x.size(2), d = x.size(3);
  const RotaryArgs args = {.x = in.const_data_ptr(),
                           .type = float_type(kOp, "x", x.scalar_type()),
                           .batch_stride = in.stride(0),
                           .length_stride = in.stride(1),
                           .head_stride = in.stride(2),
                           .length = length,
                           .heads = heads,
                           .d = d,
                           .cos = tables.cos(),
                           .sin = tables.sin(),
                           .angle_type = tables.type(),
                           .angle_batch_stride = tables.batch_stride(),
                           .r = tables.r(),
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
