// Passes of linear, activations="float": sums over groups of s * (sum over k of x * (u - z)), where
// activations are not rounded.
//
// One fma per weight, k upwards, in fp32; the order of docs/arithmetic.md, the same at every batch
// size.
#pragma once
#include "linear_passes.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// Calls visit(lines of u, k, weight) for kLines * 16 outputs of a `group` chunk, 4 k each, and
/// end_group(scales) behind each group: the sum of x * weight(l, integer of u) is to be scaled.
template <int kLines, class Visit, class EndGroup>
SLMOPS_INLINE void for_group_lines(const Format& f, const Chunk& chunk, int half,
                                   const Visit& visit, const EndGroup& end_group) {
  const int64_t line_k = f.bits == 4 ? 8 : 4;
  const int64_t scale_offset = f.group / line_k * 2 * kLineBytes + half * 32;
  const uint8_t* group = chunk.lines;
  for (int64_t k = 0; k < chunk.count; group += f.group_bytes) {
    F32 slope[kLines], shift[kLines], scale[kLines];
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) {
      const uint8_t* scales = group + scale_offset + l * 32;
      const F32 s = load_scale(f.scale_type, scales);
      F32 z = splat(f.bits == 4 ? 8.0f : 128.0f);
      if (f.zero_kind == ZeroKind::int16) z = to_f32(load_i16(scales + kLineBytes));
      if (f.zero_kind == ZeroKind::floating) z = load_scale(f.scale_type, scales + kLineBytes);
      // u - z, scaled by s after the sum; or s * u + m, and no scale after it.
      slope[l] = splat(1.0f);
      shift[l] = negate(z);
      scale[l] = s;
      if (f.zero_kind == ZeroKind::offset) {
        slope[l] = s;
        shift[l] = load_scale(f.scale_type, scales + kLineBytes);
        scale[l] = splat(1.0f);
      }
    }
    const auto weight = [&](int l, I32 u) { return fma(to_f32(u), slope[l], shift[l]); };
    const uint8_t* lines = group + half * kLineBytes;
    for (const int64_t end = k + f.group; k < end; k += line_k, lines += 2 * kLineBytes) {
      Line low[kLines], high[kLines];
      if (f.bits == 4) {
        load_nibbles(lines, low, high);
        visit(low, k, weight);
        visit(high, k + 4, weight);
      } else {
#pragma GCC unroll 2
        for (int l = 0; l < kLines; ++l) low[l] = load_line(lines + l * kLineBytes);
        visit(low, k, weight);
      }
    }
    end_group(scale);
  }
}

/// The same of a sub16 chunk, whose sums have no scales but the outputs' own.
template <int kLines, class Visit>
SLMOPS_INLINE void for_sub16_lines(const Chunk& chunk, int half, const Visit& visit) {
  const uint8_t* block = chunk.lines;
  for (int64_t k = 0; k < chunk.count; block += kSubBlockBytes) {
    for (int j = 0; j < 4; ++j) {
      I32 sub[kLines];
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        sub[l] = sub_scales(block + 16 * kLineBytes + (half + l) * 32, j) & splat_i32(15);
      }
      const auto weight = [&](int l, I32 u) { return to_f32((u + splat_i32(-8)) * sub[l]); };
      for (int i = 0; i < 2; ++i, k += 8) {
        Line low[kLines], high[kLines];
        load_nibbles(block + (4 * j + 2 * i + half) * kLineBytes, low, high);
        visit(low, k, weight);
        visit(high, k + 4, weight);
      }
    }
  }
}

/// take(i, weights of the lines' k number i), i in 0..3.
template <int kLines, class Weight, class Take>
SLMOPS_INLINE void for_weights(const Line (&u)[kLines], const Weight& weight, const Take& take) {
  F32 w[4][kLines];
#pragma GCC unroll 2
  for (int l = 0; l < kLines; ++l) {
    w[0][l] = weight(l, lane_byte<0>(u[l]));
    w[1][l] = weight(l, lane_byte<1>(u[l]));
    w[2][l] = weight(l, lane_byte<2>(u[l]));
    w[3][l] = weight(l, lane_byte<3>(u[l]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) take(i, w[i]);
}

template <int kRows, int kLines>
SLMOPS_INLINE void copy(const F32 (&from)[kRows][kLines], F32 (&to)[kRows][kLines]) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) to[r][l] = from[r][l];
  }
}

/// Adds a chunk's products to the sums; x points at the pass's first row and the chunk's first k.
template <class A, int kRows, int kLines>
SLMOPS_INLINE void float_pass(const Format& f, const Chunk& chunk, int half, const float* x,
                              int64_t stride, A ask, F32 (&acc)[kRows][kLines]) {
  F32 t[kRows][kLines];
  const auto add = [&](const auto& u, int64_t k, const auto& weight) {
    ask.more();
    for_weights(u, weight, [&](int i, const auto& w) { add_products(x + k + i, stride, w, t); });
  };
  if (f.scale_kind == ScaleKind::sub16) {
    copy(acc, t);
    for_sub16_lines<kLines>(chunk, half, add);
    return copy(t, acc);
  }
  clear(t);
  for_group_lines<kLines>(f, chunk, half, add, [&](const auto& scale) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) acc[r][l] = fma(t[r][l], scale[l], acc[r][l]);
    }
    clear(t);
  });
}

/// A chunk's weights, [k][kTile], and behind them the scales of its groups, [group][kTile].
inline void expand_floats(const Format& f, const Chunk& chunk, float* out) {
  for (int half = 0; half < 2; ++half) {
    float* mine = out + half * kLanes;
    float* scales = mine + chunk.count * kTile;
    const auto keep = [&](const auto& u, int64_t k, const auto& weight) {
      for_weights(u, weight, [&](int i, const auto& w) { store(mine + (k + i) * kTile, w[0]); });
    };
    if (f.scale_kind == ScaleKind::sub16) {
      for_sub16_lines<1>(chunk, half, keep);
    } else {
      for_group_lines<1>(f, chunk, half, keep, [&](const auto& scale) {
        store(scales, scale[0]);
        scales += kTile;
      });
    }
  }
}

/// float_pass of expanded weights.
template <int kRows, int kLines>
SLMOPS_INLINE void expanded_float_pass(const Format& f, int64_t count, const float* weights,
                                       int half, const float* x, int64_t stride,
                                       F32 (&acc)[kRows][kLines]) {
  const float* scales = weights + count * kTile + half * kLanes;
  weights += half * kLanes;
  const bool scaled = f.scale_kind == ScaleKind::group;
  const int64_t group = scaled ? f.group : count;
  for (int64_t k = 0; k < count; k += group, scales += kTile) {
    F32 t[kRows][kLines];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) t[r][l] = scaled ? splat(0.0f) : acc[r][l];
    }
    for (int64_t i = 0; i < group; ++i, weights += kTile, ++x) {
      F32 w[kLines];
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) w[l] = load(weights + l * kLanes);
      add_products(x, stride, w, t);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        acc[r][l] = scaled ? fma(t[r][l], load(scales + l * kLanes), acc[r][l]) : t[r][l];
      }
    }
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
