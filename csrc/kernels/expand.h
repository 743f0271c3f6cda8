// out[k][n] = w[n][k]: a tile of a packed weight as floats, the values of `embedding`.
#pragma once
#include "common.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// The scales of 16 outputs: w = fma(u, slope, shift) * scale, as in embedding.h.
struct Scales {
  F32 slope, shift, scale;
};

inline Scales group_scales(const Format& f, const uint8_t* scales) {
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

/// Stores the four k of a line of u, the first one at `out`; not more than `count` of them.
template <class Weight>
SLMOPS_INLINE void expand_line(Line u, int64_t count, DType type, uint8_t* out, int64_t stride,
                               const Weight& weight) {
  const I32 lanes[4] = {lane_byte<0>(u), lane_byte<1>(u), lane_byte<2>(u), lane_byte<3>(u)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    if (i < count) store_as(type, out + i * stride, 0, weight(lanes[i]));
  }
}

/// 16 outputs of a tile; `stride` in bytes.
inline void expand_half(const Format& f, const uint8_t* tile, int half, DType type, uint8_t* out,
                        int64_t stride) {
  const int64_t step = f.scale_kind == ScaleKind::sub16 ? kSubGroup : f.group;
  const int64_t line_k = f.bits == 4 ? 8 : 4;
  const F32 own = f.scale_kind == ScaleKind::sub16
                      ? load(reinterpret_cast<const float*>(
                            tile + f.k_padded / kSubBlock * kSubBlockBytes + half * 64))
                      : splat(1.0f);
  for (int64_t start = 0; start < f.k; start += step) {
    const uint8_t* lines;
    Scales s;
    I32 sub = splat_i32(1);
    if (f.scale_kind == ScaleKind::sub16) {
      const uint8_t* block = tile + start / kSubBlock * kSubBlockBytes;
      const int j = static_cast<int>(start % kSubBlock / kSubGroup);
      lines = block + 4 * j * kLineBytes;
      sub = sub_scales(block + 16 * kLineBytes + half * 32, j) & splat_i32(15);
      s = {splat(1.0f), splat(0.0f), own};
    } else {
      lines = tile + start / step * f.group_bytes;
      s = group_scales(f, lines + line_bytes(f, f.group) + half * 32);
    }
    const bool subs = f.scale_kind == ScaleKind::sub16;
    const auto weight = [&](I32 u) {
      const I32 v = subs ? (u + splat_i32(-8)) * sub : u;
      return fma(to_f32(v), s.slope, s.shift) * s.scale;
    };
    const int64_t end = start + step < f.k ? start + step : f.k;
    lines += half * kLineBytes;
    for (int64_t k = start; k < end; k += line_k, lines += 2 * kLineBytes) {
      const Line line = load_line(lines);
      uint8_t* at = out + k * stride;
      if (f.bits == 4) {
        expand_line(low_nibbles(line), end - k, type, at, stride, weight);
        expand_line(high_nibbles(line), end - k - 4, type, at + 4 * stride, stride, weight);
      } else {
        expand_line(line, end - k, type, at, stride, weight);
      }
    }
  }
}

/// KernelTable::expand.
inline void expand_tile(const Format& f, const uint8_t* packed, int64_t tile, DType type, void* out,
                        int64_t stride) {
  const uint8_t* bytes = packed + kHeaderBytes + tile * f.tile_bytes;
  for (int half = 0; half < 2; ++half) {
    expand_half(f, bytes, half, type, static_cast<uint8_t*>(out) + half * kLanes * size_of(type),
                stride * size_of(type));
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
