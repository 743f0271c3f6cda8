// pack_: plain codes and scales into a caller's buffer in the packed layout
// (docs/packed-format.md).
//
// The buffer is the caller's so that it can lie in huge pages. Its header is written last: a buffer
// that pack_ refused halfway is not a packed weight.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "parallel.h"
#include "text.h"

namespace slmops {
namespace {

constexpr char kOp[] = "pack_";

/// What a share of tiles found in the values that it packed.
struct Findings {
  uint8_t largest_code = 0, largest_sub = 0;
  int16_t least_zero = 0, largest_zero = 0;
  bool all_finite = true;
};

uint8_t largest(const uint8_t* values, int64_t count, uint8_t so_far) {
  for (int64_t i = 0; i < count; ++i) so_far = std::max(so_far, values[i]);
  return so_far;
}

/// Looks at the rows of one tile, which the packing that follows then finds in the cache.
void look(const Format& f, const Parts& parts, int64_t tile, Findings* found) {
  const int64_t first = tile * kTile, rows = std::min(kTile, f.n - first);
  const int64_t groups = groups_per_row(f);
  found->largest_code = largest(parts.codes + first * f.k, rows * f.k, found->largest_code);
  if (f.scale_kind == ScaleKind::sub16) {
    found->largest_sub =
        largest(parts.sub_scale + first * groups, rows * groups, found->largest_sub);
    const float* scale = static_cast<const float*>(parts.scale) + first;
    found->all_finite &= is_finite(scale, rows, f.scale_type);
    return;
  }
  const auto halves = [&](const void* p) {
    return static_cast<const uint16_t*>(p) + first * groups;
  };
  found->all_finite &= is_finite(halves(parts.scale), rows * groups, f.scale_type);
  if (f.zero_kind == ZeroKind::floating || f.zero_kind == ZeroKind::offset) {
    found->all_finite &= is_finite(halves(parts.zero_point), rows * groups, f.scale_type);
  } else if (f.zero_kind == ZeroKind::int16) {
    const int16_t* zero = static_cast<const int16_t*>(parts.zero_point) + first * groups;
    const auto [least, most] = std::minmax_element(zero, zero + rows * groups);
    found->least_zero = std::min(found->least_zero, *least);
    found->largest_zero = std::max(found->largest_zero, *most);
  }
}

void check(const Format& f, const Findings& found) {
  const int largest_code = (1 << f.bits) - 1;
  SLMOPS_CHECK(found.largest_code <= largest_code, kOp, ": expected codes in 0..", largest_code,
               " (", f.bits, " bits), got ", int{found.largest_code});
  SLMOPS_CHECK(found.largest_sub <= 15, kOp, ": expected sub_scale in 0..15, got ",
               int{found.largest_sub});
  SLMOPS_CHECK(found.all_finite, kOp,
               ": expected finite scale and zero_point, got an infinity or a NaN");
  SLMOPS_CHECK(found.least_zero >= 0 && found.largest_zero <= largest_code, kOp,
               ": expected integer zero_point in 0..", largest_code, ", got ",
               found.least_zero < 0 ? found.least_zero : found.largest_zero);
}

DType scale_type_of(const Tensor& scale, ScaleKind kind) {
  const ScalarType type = scale.scalar_type();
  if (kind == ScaleKind::sub16) {
    SLMOPS_CHECK(type == ScalarType::Float, kOp,
                 ": expected scale of dtype float32 beside sub_scale, got ", name(type));
    return DType::f32;
  }
  SLMOPS_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, kOp,
               ": expected scale of dtype float16 or bfloat16, got ", name(type));
  return float_type(kOp, "scale", type);
}

ZeroKind zero_kind_of(const std::optional<Tensor>& zero_point, const Tensor& scale, bool offset) {
  SLMOPS_CHECK(is_present(zero_point) || !offset, kOp, ": expected zero_point with offset=True");
  if (!is_present(zero_point)) return ZeroKind::none;
  const ScalarType type = zero_point->scalar_type();
  if (offset) {
    check_type(kOp, "zero_point", *zero_point, scale.scalar_type());
    return ZeroKind::offset;
  }
  if (type == ScalarType::Short) return ZeroKind::int16;
  SLMOPS_CHECK(type == scale.scalar_type(), kOp, ": expected zero_point of dtype int16 or ",
               name(scale.scalar_type()), " (the scale's), got ", name(type));
  return ZeroKind::floating;
}

void pack(Tensor out, const Tensor& codes, const Tensor& scale,
          const std::optional<Tensor>& zero_point, const std::optional<Tensor>& sub_scale,
          int64_t bits, int64_t group_size, int64_t act_group, Text activations, bool offset) {
  const Activations mode = parse_activations(kOp, activations.take());
  check_type(kOp, "codes", codes, ScalarType::Byte);
  SLMOPS_CHECK(codes.dim() == 2, kOp, ": expected codes of shape (n, k), got ", shape(codes));
  const ScaleKind kind = is_present(sub_scale) ? ScaleKind::sub16 : ScaleKind::group;
  const Format f =
      make_format(kOp, codes.size(0), codes.size(1), bits, kind, scale_type_of(scale, kind),
                  zero_kind_of(zero_point, scale, offset), group_size, act_group, mode);
  const int64_t groups = groups_per_row(f);
  std::optional<Tensor> zero, sub;  // contiguous, owned until the end
  if (kind == ScaleKind::sub16) {
    check_shape(kOp, "scale", scale, {f.n});
    check_shape(kOp, "sub_scale", *sub_scale, {f.n, groups});
    check_type(kOp, "sub_scale", *sub_scale, ScalarType::Byte);
    sub = to_contiguous(*sub_scale);
  } else {
    check_shape(kOp, "scale", scale, {f.n, groups});
  }
  if (f.zero_kind != ZeroKind::none) {
    check_shape(kOp, "zero_point", *zero_point, {f.n, groups});
    zero = to_contiguous(*zero_point);
  }
  check_type(kOp, "out", out, ScalarType::Byte);
  SLMOPS_CHECK(out.dim() == 1 && out.is_contiguous() && out.numel() == f.total_bytes, kOp,
               ": expected out to be 1-D, contiguous and of ", f.total_bytes, " bytes, got shape ",
               shape(out));

  const Tensor plain_codes = to_contiguous(codes), plain_scale = to_contiguous(scale);
  // pack_tiles only reads them: Parts is one struct for both directions.
  const auto writable = [](const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); };
  const Parts parts = {static_cast<uint8_t*>(writable(plain_codes)), writable(plain_scale),
                       zero ? writable(*zero) : nullptr,
                       sub ? static_cast<uint8_t*>(writable(*sub)) : nullptr};
  uint8_t* data = static_cast<uint8_t*>(out.mutable_data_ptr());
  memset(data, 0, kHeaderBytes);
  const int64_t shares = share_count(f.tiles, f.k * kTile);
  std::vector<Findings> found(static_cast<size_t>(shares));
  parallel(f.tiles, shares, [&](int64_t share, int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      look(f, parts, tile, &found[static_cast<size_t>(share)]);
      pack_tiles(f, parts, data, tile, tile + 1);
    }
  });
  for (const Findings& one : found) check(f, one);
  write_header(f, data);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def(
      "pack_(Tensor(a!) out, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? sub_scale, "
      "int bits, int group_size, int act_group, str activations, bool offset=False) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("pack_", TORCH_BOX(&pack)); }

}  // namespace slmops
