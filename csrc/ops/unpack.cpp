// unpack: packed weights back to the plain tensors that pack_ took.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "check.h"
#include "parallel.h"

namespace slmops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> unpack(const Tensor& packed) {
  const Format f = packed_format("unpack", packed);
  const int64_t groups = groups_per_row(f);
  const bool sub16 = f.scale_kind == ScaleKind::sub16;
  const ScalarType scale_type = scalar_type(f.scale_type);
  Tensor codes = new_tensor({f.n, f.k}, ScalarType::Byte);
  Tensor scale = sub16 ? new_tensor({f.n}, scale_type) : new_tensor({f.n, groups}, scale_type);
  Tensor zero_point =
      f.zero_kind == ZeroKind::none
          ? new_tensor({0}, ScalarType::Short)
          : new_tensor({f.n, groups},
                       f.zero_kind == ZeroKind::int16 ? ScalarType::Short : scale_type);
  Tensor sub_scale =
      sub16 ? new_tensor({f.n, groups}, ScalarType::Byte) : new_tensor({0}, ScalarType::Byte);
  const Parts parts = {static_cast<uint8_t*>(codes.mutable_data_ptr()), scale.mutable_data_ptr(),
                       zero_point.mutable_data_ptr(),
                       static_cast<uint8_t*>(sub_scale.mutable_data_ptr())};
  const uint8_t* data = static_cast<const uint8_t*>(packed.const_data_ptr());
  parallel(f.tiles, share_count(f.tiles, f.k * kTile),
           [&](int64_t, int64_t begin, int64_t end) { unpack_tiles(f, data, parts, begin, end); });
  return {codes, scale, zero_point, sub_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def(
      "unpack(Tensor packed) -> (Tensor codes, Tensor scale, Tensor zero_point, Tensor "
      "sub_scale)");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("unpack", TORCH_BOX(&unpack)); }

}  // namespace slmops
