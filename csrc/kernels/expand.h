// out[k][n] = w[n][k]: a tile of a packed weight as floats, the values of `embedding`.
#pragma once
#include "common.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// The scales of 16 outputs: w = fma(u, slope, shift) * scale, as in embedding.h.
struct Scales {
  F32 slope, shift, scale;
};

/// Those of a group of k whose scales stand at `scales`.
SLMOPS_INLINE Scales group_scales(const Format& f, const uint8_t* scales) {
  F32 zero = splat(f.bits == 4 ? 8.0f : 128.0f);
  if (f.zero_kind == ZeroKind::int16) {
    zero = to_f32(load_i16(scales + kLineBytes));
  } else if (f.zero_kind != ZeroKind::none) {
    zero = load_scale(f.scale_type, scales + kLineBytes);
  }
  const F32 s = load_scale(f.scale_type, scales);
  if (f.zero_kind == ZeroKind::offset) return {s, zero, splat(1.0f)};
  return {splat(1.0f), negate(zero), s};
}

/// Those of group j of a sub16 block; sub * u - 8 * sub is exact.
SLMOPS_INLINE Scales sub_group_scales(const uint8_t* block, int j, int half, F32 own) {
  const F32 sub = to_f32(sub_scales(block + 16 * kLineBytes + half * 32, j) & splat_i32(15));
  return {sub, sub * splat(-8.0f), own};
}

/// Stores the four k of a line of u, the first one at `out`; not more than `count` of them.
template <DType kType>
SLMOPS_INLINE void expand_line(Line u, const Scales& s, int64_t count, uint8_t* out,
                               int64_t stride) {
  const I32 lanes[4] = {lane_byte<0>(u), lane_byte<1>(u), lane_byte<2>(u), lane_byte<3>(u)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    if (i >= count) return;
    store_as(kType, out + i * stride, 0, fma(to_f32(lanes[i]), s.slope, s.shift) * s.scale);
  }
}

/// `count` k of 16 outputs that have their scales in common; `stride` in bytes.
template <DType kType>
SLMOPS_INLINE void expand_lines(int bits, const uint8_t* lines, const Scales& s, int64_t count,
                                uint8_t* out, int64_t stride) {
  const int64_t line_k = bits == 4 ? 8 : 4;
  for (int64_t k = 0; k < count; k += line_k, lines += 2 * kLineBytes, out += line_k * stride) {
    const Line line = load_line(lines);
    if (bits == 4) {
      expand_line<kType>(low_nibbles(line), s, count - k, out, stride);
      expand_line<kType>(high_nibbles(line), s, count - k - 4, out + 4 * stride, stride);
    } else {
      expand_line<kType>(line, s, count - k, out, stride);
    }
  }
}

template <DType kType>
inline void expand_as(const Format& f, const uint8_t* tile, uint8_t* out, int64_t stride) {
  const bool sub16 = f.scale_kind == ScaleKind::sub16;
  const int64_t step = sub16 ? kSubGroup : f.group;
  F32 own[2] = {splat(1.0f), splat(1.0f)};
  for (int half = 0; half < 2 && sub16; ++half) {
    const uint8_t* scales = tile + f.k_padded / kSubBlock * kSubBlockBytes;
    own[half] = load(reinterpret_cast<const float*>(scales + half * 64));
  }
  for (int64_t k = 0; k < f.k; k += step) {
    const int64_t count = f.k - k < step ? f.k - k : step;
    const uint8_t* group = tile + k / scale_block(f) * f.group_bytes;
    const int j = static_cast<int>(k % kSubBlock / kSubGroup);
    for (int half = 0; half < 2; ++half) {
      const Scales s = sub16 ? sub_group_scales(group, j, half, own[half])
                             : group_scales(f, group + line_bytes(f, f.group) + half * 32);
      const uint8_t* lines = group + (sub16 ? 4 * j * kLineBytes : 0) + half * kLineBytes;
      uint8_t* at = out + k * stride + half * kLanes * size_of(kType);
      expand_lines<kType>(f.bits, lines, s, count, at, stride);
    }
  }
}

/// KernelTable::expand.
inline void expand_tile(const Format& f, const uint8_t* packed, int64_t tile, DType type, void* out,
                        int64_t stride) {
  const uint8_t* bytes = packed + kHeaderBytes + tile * f.tile_bytes;
  with_type(type, [&](auto constant) {
    constexpr DType kType = decltype(constant)::value;
    expand_as<kType>(f, bytes, static_cast<uint8_t*>(out), stride * size_of(kType));
  });
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
