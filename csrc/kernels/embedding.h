// out[i][k] = w[ids[i]][k] = s * (u - z), or s * u + m: rows of a packed weight as floats.
#pragma once
#include "common.h"

namespace slmops::SLMOPS_ISA {
namespace {

inline int32_t code_at(const Format& f, const uint8_t* lines, int64_t k, int64_t output) {
  const int64_t lane = output / 16 * kLineBytes + output % 16 * 4 + k % 4;
  if (f.bits == 8) return lines[k / 4 * 2 * kLineBytes + lane];
  const uint8_t byte = lines[k / 8 * 2 * kLineBytes + lane];
  return k % 8 < 4 ? byte & 15 : byte >> 4;
}

/// A scale or float zero point as 16 equal lanes.
inline F32 splat_scale(DType t, const uint8_t* p) {
  uint8_t repeated[2 * kLanes];
  for (int i = 0; i < kLanes; ++i) memcpy(repeated + 2 * i, p, 2);
  return load_scale(t, repeated);
}

/// w = fma(u, slope, shift) * scale: (u - z) * s, or s * u + m; for sub16 u is already
/// sub * (u - 8).
struct Affine {
  F32 slope, shift, scale;
};

inline Affine affine_at(const Format& f, const uint8_t* tile, const uint8_t* group,
                        int64_t output) {
  if (f.scale_kind == ScaleKind::sub16) {
    float own;
    memcpy(&own, tile + f.k_padded / kSubBlock * kSubBlockBytes + output * 4, sizeof(own));
    return {splat(1.0f), splat(0.0f), splat(own)};
  }
  const uint8_t* scale = group + f.group * kTile * f.bits / 8 + 2 * output;
  F32 zero = splat(f.bits == 4 ? 8.0f : 128.0f);
  if (f.zero_kind == ZeroKind::int16) {
    int16_t z;
    memcpy(&z, scale + kLineBytes, sizeof(z));
    zero = splat(static_cast<float>(z));
  } else if (f.zero_kind != ZeroKind::none) {
    zero = splat_scale(f.scale_type, scale + kLineBytes);
  }
  const F32 s = splat_scale(f.scale_type, scale);
  if (f.zero_kind == ZeroKind::offset) return {s, zero, splat(1.0f)};
  return {splat(1.0f), negate(zero), s};
}

inline void embedding_row(const Format& f, const uint8_t* tile, int64_t output, DType type,
                          void* out) {
  const int64_t step = f.scale_kind == ScaleKind::sub16 ? kSubBlock : f.group;
  for (int64_t start = 0; start < f.k; start += step) {
    const uint8_t* group = tile + start / step * f.group_bytes;
    const Affine affine = affine_at(f, tile, group, output);
    for (int64_t i = 0; i < step && start + i < f.k; i += kLanes) {
      int32_t u[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) u[j] = code_at(f, group, i + j, output);
      if (f.scale_kind == ScaleKind::sub16) {
        const uint8_t pair = group[16 * kLineBytes + 2 * output + i / 32];
        const int32_t sub = i / kSubGroup % 2 == 0 ? pair & 15 : pair >> 4;
        for (int32_t& v : u) v = (v - 8) * sub;
      }
      const F32 w = fma(to_f32(load_i32(u)), affine.slope, affine.shift) * affine.scale;
      const int64_t count = f.k - start - i < kLanes ? f.k - start - i : kLanes;
      if (count == kLanes) {
        store_as(type, out, start + i, w);
      } else {
        store_tail(type, out, start + i, w, count);
      }
    }
  }
}

inline void embedding(const Format& f, const uint8_t* packed, const int64_t* ids, int64_t count,
                      DType type, void* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* tile = packed + kHeaderBytes + ids[i] / kTile * f.tile_bytes;
    embedding_row(f, tile, ids[i] % kTile, type,
                  static_cast<uint8_t*>(out) + i * f.k * size_of(type));
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
