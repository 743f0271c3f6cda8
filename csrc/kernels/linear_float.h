// out[m][n] = sum over groups of s * (sum over k of x[m][k] * (u[n][k] - z)): activations are not
// rounded.
//
// One fma per weight, k upwards, in fp32; the order of docs/arithmetic.md, the same at every batch
// size.
#pragma once
#include "linear.h"

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

template <int kRows>
inline void float_group_block(const Format& f, const uint8_t* tile, int half, const float* x,
                              F32 (&acc)[kRows]) {
  const int64_t line_k = f.bits == 4 ? 8 : 4;
  const int64_t scale_offset = f.group / line_k * 2 * kLineBytes + half * 32;
  for (int64_t k = 0; k < f.k_padded; tile += f.group_bytes) {
    const uint8_t* scales = tile + scale_offset;
    F32 z = splat(f.bits == 4 ? 8.0f : 128.0f);
    if (f.zero_kind == ZeroKind::int16) z = to_f32(load_i16(scales + kLineBytes));
    if (f.zero_kind == ZeroKind::floating) z = load_scale(f.scale_type, scales + kLineBytes);
    const auto weight = [&](I32 u) { return to_f32(u) - z; };
    F32 t[kRows];
    for (F32& lane : t) lane = splat(0.0f);
    const uint8_t* lines = tile + half * kLineBytes;
    for (const int64_t end = k + f.group; k < end; k += line_k, lines += 2 * kLineBytes) {
      const Line line = load_line(lines);
      if (f.bits == 4) {
        add_float(low_nibbles(line), x + k, f.k_padded, weight, t);
        add_float(high_nibbles(line), x + k + 4, f.k_padded, weight, t);
      } else {
        add_float(line, x + k, f.k_padded, weight, t);
      }
    }
    const F32 s = load_scale(f.scale_type, scales);
    for (int r = 0; r < kRows; ++r) acc[r] = fma(t[r], s, acc[r]);
  }
}

template <int kRows>
inline void float_sub16_block(const Format& f, const uint8_t* tile, int half, const float* x,
                              F32 (&acc)[kRows]) {
  for (int64_t k = 0; k < f.k_padded; tile += kSubBlockBytes) {
    for (int j = 0; j < 4; ++j) {
      const I32 sub = sub_scales(tile + 16 * kLineBytes + half * 32, j) & splat_i32(15);
      const auto weight = [&](I32 u) { return to_f32((u + splat_i32(-8)) * sub); };
      for (int i = 0; i < 2; ++i, k += 8) {
        const Line line = load_line(tile + (4 * j + 2 * i + half) * kLineBytes);
        add_float(low_nibbles(line), x + k, f.k_padded, weight, acc);
        add_float(high_nibbles(line), x + k + 4, f.k_padded, weight, acc);
      }
    }
  }
}

inline void linear_float(const LinearArgs& args, const uint8_t* tile, int64_t first_output,
                         int64_t row_begin, int64_t row_end) {
  const Format& f = *args.format;
  for_blocks(args, tile, first_output, row_begin, row_end, [&](auto rows, auto& acc, int64_t row) {
    constexpr int kRows = decltype(rows)::value;
    for (int half = 0; half < 2; ++half) {
      F32 column[kRows];
      for (F32& lane : column) lane = splat(0.0f);
      const float* x = args.x + row * f.k_padded;
      if (f.scale_kind == ScaleKind::sub16) {
        float_sub16_block<kRows>(f, tile, half, x, column);
      } else {
        float_group_block<kRows>(f, tile, half, x, column);
      }
      for (int r = 0; r < kRows; ++r) acc[r][half] = column[r];
    }
  });
}

/// The table's entry: every format and activation mode.
inline void linear(const LinearArgs& args, int64_t tile_index, int64_t row_begin, int64_t row_end) {
  const Format& f = *args.format;
  const uint8_t* tile = args.packed + kHeaderBytes + tile_index * f.tile_bytes;
  const int64_t first_output = tile_index * kTile;
  if (f.activations != Activations::int8)
    return linear_float(args, tile, first_output, row_begin, row_end);
  if (f.scale_kind == ScaleKind::sub16)
    return linear_sub16(args, tile, first_output, row_begin, row_end);
  if (f.bits == 4) return linear_bits<4>(args, tile, first_output, row_begin, row_end);
  linear_bits<8>(args, tile, first_output, row_begin, row_end);
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
