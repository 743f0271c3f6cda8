// Passes of linear, activations="float": sums over groups of s * (sum over k of x * (u - z)), where
// activations are not rounded.
//
// One fma per weight, k upwards, in fp32; the order of docs/arithmetic.md, the same at every batch
// size.
#pragma once
#include "linear_passes.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// t[r] = fma(x[r][k], w, t[r]) for the four k of a line of u; weight(lane) turns a lane's integer
/// into w.
template <int kRows, class Weight>
SLMOPS_INLINE void add_float(Line u, const float* x, int64_t stride, const Weight& weight,
                             F32 (&t)[kRows]) {
  const F32 w[4] = {weight(lane_byte<0>(u)), weight(lane_byte<1>(u)), weight(lane_byte<2>(u)),
                    weight(lane_byte<3>(u))};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) t[r] = fma(splat(x[r * stride + i]), w[i], t[r]);
  }
}

/// x points at the pass's first row and the chunk's first k.
template <int kRows>
SLMOPS_INLINE void float_group_pass(const Format& f, const Chunk& chunk, int half, const float* x,
                                    int64_t stride, F32 (&acc)[kRows]) {
  const int64_t line_k = f.bits == 4 ? 8 : 4;
  const int64_t scale_offset = f.group / line_k * 2 * kLineBytes + half * 32;
  const uint8_t* group = chunk.lines;
  for (int64_t k = 0; k < chunk.count; group += f.group_bytes) {
    const uint8_t* scales = group + scale_offset;
    const F32 s = load_scale(f.scale_type, scales);
    F32 z = splat(f.bits == 4 ? 8.0f : 128.0f);
    if (f.zero_kind == ZeroKind::int16) z = to_f32(load_i16(scales + kLineBytes));
    if (f.zero_kind == ZeroKind::floating) z = load_scale(f.scale_type, scales + kLineBytes);
    // u - z, scaled by s after the sum; or s * u + m, and no scale after it.
    F32 slope = splat(1.0f), shift = negate(z), scale = s;
    if (f.zero_kind == ZeroKind::offset) {
      slope = s;
      shift = load_scale(f.scale_type, scales + kLineBytes);
      scale = splat(1.0f);
    }
    const auto weight = [&](I32 u) { return fma(to_f32(u), slope, shift); };
    F32 t[kRows];
    for (F32& lane : t) lane = splat(0.0f);
    const uint8_t* lines = group + half * kLineBytes;
    for (const int64_t end = k + f.group; k < end; k += line_k, lines += 2 * kLineBytes) {
      const Line line = load_line(lines);
      if (f.bits == 4) {
        add_float(low_nibbles(line), x + k, stride, weight, t);
        add_float(high_nibbles(line), x + k + 4, stride, weight, t);
      } else {
        add_float(line, x + k, stride, weight, t);
      }
    }
    for (int r = 0; r < kRows; ++r) acc[r] = fma(t[r], scale, acc[r]);
  }
}

template <int kRows>
SLMOPS_INLINE void float_sub16_pass(const Chunk& chunk, int half, const float* x, int64_t stride,
                                    F32 (&acc)[kRows]) {
  const uint8_t* block = chunk.lines;
  for (int64_t k = 0; k < chunk.count; block += kSubBlockBytes) {
    for (int j = 0; j < 4; ++j) {
      const I32 sub = sub_scales(block + 16 * kLineBytes + half * 32, j) & splat_i32(15);
      const auto weight = [&](I32 u) { return to_f32((u + splat_i32(-8)) * sub); };
      for (int i = 0; i < 2; ++i, k += 8) {
        const Line line = load_line(block + (4 * j + 2 * i + half) * kLineBytes);
        add_float(low_nibbles(line), x + k, stride, weight, acc);
        add_float(high_nibbles(line), x + k + 4, stride, weight, acc);
      }
    }
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
