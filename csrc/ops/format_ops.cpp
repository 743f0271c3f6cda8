// _packed_bytes and _describe: the size and the header of packed weights, so that the layout is
// known in C++ only.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "check.h"
#include "text.h"

namespace slmops {
namespace {

/// Zero points take the same room whether integer or float, and so do fp16 and bf16 scales.
int64_t packed_bytes(int64_t n, int64_t k, int64_t bits, Text scale_kind, bool has_zero_point,
                     int64_t group_size, int64_t act_group) {
  constexpr char kOp[] = "_packed_bytes";
  const ScaleKind kind = parse_scale_kind(kOp, scale_kind.take());
  return make_format(kOp, n, k, bits, kind, kind == ScaleKind::sub16 ? DType::f32 : DType::f16,
                     has_zero_point ? ZeroKind::int16 : ZeroKind::none, group_size, act_group,
                     Activations::floating)
      .total_bytes;
}

std::vector<int64_t> describe(const Tensor& packed) {
  const Format f = packed_format("_describe", packed);
  return {f.bits,
          static_cast<int64_t>(f.scale_kind),
          static_cast<int64_t>(f.scale_type),
          static_cast<int64_t>(f.zero_kind),
          static_cast<int64_t>(f.activations),
          f.n,
          f.k,
          f.group,
          f.act_group,
          f.total_bytes};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def(
      "_packed_bytes(int n, int k, int bits, str scale_kind, bool has_zero_point, int group_size, "
      "int act_group) -> int");
  m.def("_describe(Tensor packed) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CompositeExplicitAutograd, m) {
  m.impl("_packed_bytes", TORCH_BOX(&packed_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("_describe", TORCH_BOX(&describe)); }

}  // namespace slmops
