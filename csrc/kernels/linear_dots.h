// Integer dots of a pass: kRows rows of codes with kLines * 16 outputs of a tile, exact in int32.
//
// Each function adds a few lines of k; lanes are outputs. The sums are exact, so any row may form
// them as it likes.
#pragma once
#include "common.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// What a pass asks memory for while it goes over its lines: `step` bytes at each call of more(),
/// from `next` on, which is the first line behind `limit`.
struct Ask {
  const uint8_t* next = nullptr;
  const uint8_t* limit = nullptr;
  int64_t step = 0;

  SLMOPS_INLINE void more() {
    limit += step;
    for (; next < limit; next += kLineBytes) prefetch(next);
  }
};

/// In its place: nothing, where even that little is felt.
struct NoAsk {
  SLMOPS_INLINE void more() {}
};

/// The nibbles of kLines lines.
template <int kLines>
SLMOPS_INLINE void load_nibbles(const uint8_t* lines, Line (&low)[kLines], Line (&high)[kLines]) {
#pragma GCC unroll 2
  for (int l = 0; l < kLines; ++l) {
    const Line both = load_line(lines + l * kLineBytes);
    low[l] = low_nibbles(both);
    high[l] = high_nibbles(both);
  }
}

/// What a unit's integer sums start from, so that they end as sum of code * (u - z), or code * u
/// for a float z or an offset; plus `bias`.
template <int kBits, ZeroKind kZero>
SLMOPS_INLINE I32 start_sums(int32_t preset, const uint8_t* zero_points, int32_t bias) {
  constexpr int32_t kBias = kBits == 8 ? kDot8Bias : 0;
  if constexpr (kZero == ZeroKind::none) return start_sum(preset + bias);
  if constexpr (kZero == ZeroKind::int16) {
    const I32 start = (load_i16(zero_points) + splat_i32(-kBias)) * splat_i32(preset);
    return kSumBias == 0 ? start : start + splat_i32(bias);
  }
  return start_sum(kBias * preset + bias);
}

/// Whether sums of `unit` products may have kSumBias added and be converted by small_to_f32: none
/// is beyond 128 * 127 * 255 < 2^22.
constexpr bool has_small_sums(int64_t unit) { return kSumBias != 0 && unit <= 128; }

/// Adds 32 k of int4 lines to the sums, of which the quads of k take turns.
template <int kSums, int kRows, int kLines>
SLMOPS_INLINE void add_int4(const uint8_t* lines, const int8_t* codes, int64_t stride,
                            I32 (&sum)[kSums][kRows][kLines]) {
  Dot4 dot[kSums][kRows][kLines];
#pragma GCC unroll 2
  for (int s = 0; s < kSums; ++s) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) dot[s][r][l] = dot4_begin(sum[s][r][l]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    if constexpr (kDotsByRows) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        dot4_rows(dot[0], l, lines + (2 * j + l) * kLineBytes, codes + j / 2 * 16, stride,
                  j % 2 * 2);
      }
      continue;
    }
    Line low[kLines], high[kLines];
    load_nibbles(lines + j * 2 * kLineBytes, low, high);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        const Codes a = load_codes(codes + r * stride + j / 2 * 16);
        Dot4 &even = dot[0][r][l], &odd = dot[kSums - 1][r][l];
        even = dot4(even, low[l], a, j % 2 * 2);
        odd = dot4(odd, high[l], a, j % 2 * 2 + 1);
      }
    }
  }
#pragma GCC unroll 2
  for (int s = 0; s < kSums; ++s) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) sum[s][r][l] = dot4_end(sum[s][r][l], dot[s][r][l]);
    }
  }
}

/// Adds 16 k of int8 lines to the sums, of which the quads of k take turns.
template <int kSums, int kRows, int kLines>
SLMOPS_INLINE void add_int8(const uint8_t* lines, const int8_t* codes, int64_t stride,
                            I32 (&sum)[kSums][kRows][kLines]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    I32(&turn)[kRows][kLines] = sum[j % kSums];
    if constexpr (kDotsByRows) {  // a line at a time, for few registers
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        const Bytes u = bytes(load_line(lines + (2 * j + l) * kLineBytes));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          turn[r][l] = dot8(turn[r][l], u, load_codes(codes + r * stride), j);
        }
      }
      continue;
    }
    Bytes u[kLines];
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l)
      u[l] = bytes(load_line(lines + j * 2 * kLineBytes + l * kLineBytes));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l)
        turn[r][l] = dot8(turn[r][l], u[l], load_codes(codes + r * stride), j);
    }
  }
}

/// Adds 16 k of sub16 lines, scaled by group j's sub-scales, to the sums.
template <int kRows, int kLines>
SLMOPS_INLINE void add_sub16(const uint8_t* block, int j, int half, const int8_t* codes,
                             int64_t stride, const int32_t* presets, int64_t preset_stride,
                             I32 (&sum)[kRows][kLines]) {
  if constexpr (kLines == 2 && !kDotsByRows) {  // each quad of codes is loaded once for both
    Dot4 dot[kRows][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      Line low[2], high[2];
      load_nibbles(block + (4 * j + 2 * i + half) * kLineBytes, low, high);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Codes a = load_codes(codes + r * stride);
#pragma GCC unroll 2
        for (int l = 0; l < 2; ++l) {
          if (i == 0) dot[r][l] = sub_begin(presets[r * preset_stride]);
          dot[r][l] = dot4(dot4(dot[r][l], low[l], a, 2 * i), high[l], a, 2 * i + 1);
        }
      }
    }
#pragma GCC unroll 2
    for (int l = 0; l < 2; ++l) {
      const auto sub = sub_scales(block + 16 * kLineBytes + (half + l) * 32, j);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][l] = sub_end(sum[r][l], dot[r][l], sub);
    }
    return;
  }
  // A line at a time: four of them unpacked are half of the registers of AVX2.
#pragma GCC unroll 2
  for (int l = 0; l < kLines; ++l) {
    const uint8_t* lines = block + j * 4 * kLineBytes + (half + l) * kLineBytes;
    if constexpr (kDotsByRows) {
      Dot4 dot[kRows][1];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) dot[r][0] = sub_begin(presets[r * preset_stride]);
      dot4_rows(dot, 0, lines, codes, stride, 0);
      dot4_rows(dot, 0, lines + 2 * kLineBytes, codes, stride, 2);
      const auto sub = sub_scales(block + 16 * kLineBytes + (half + l) * 32, j);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][l] = sub_end(sum[r][l], dot[r][0], sub);
      continue;
    }
    const Line first = load_line(lines), second = load_line(lines + 2 * kLineBytes);
    const Line u[4] = {low_nibbles(first), high_nibbles(first), low_nibbles(second),
                       high_nibbles(second)};
    const auto sub = sub_scales(block + 16 * kLineBytes + (half + l) * 32, j);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Dot4 dot = sub_begin(presets[r * preset_stride]);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) dot = dot4(dot, u[q], load_codes(codes + r * stride), q);
      sum[r][l] = sub_end(sum[r][l], dot, sub);
    }
  }
}

/// Adds a whole block of 64 k of sub16 lines to the sums, reading it in the order in which it lies
/// in memory: for at most kSubBlockRows rows, whose dots of four sub-groups fit the registers.
template <int kRows, int kLines, class A>
SLMOPS_INLINE void add_sub16_block(const uint8_t* block, int half, const int8_t* codes,
                                   int64_t stride, const int32_t* presets, int64_t preset_stride,
                                   A& ask, I32 (&sum)[kRows][kLines]) {
  Dot4 dot[4][kRows][kLines];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    ask.more();
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        const Line line = load_line(block + (4 * j + 2 * i + half + l) * kLineBytes);
        const Line low = low_nibbles(line), high = high_nibbles(line);
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
          const Codes a = load_codes(codes + r * stride + 16 * j);
          if (i == 0) dot[j][r][l] = sub_begin(presets[r * preset_stride + j]);
          dot[j][r][l] = dot4(dot4(dot[j][r][l], low, a, 2 * i), high, a, 2 * i + 1);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int l = 0; l < kLines; ++l) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto sub = sub_scales(block + 16 * kLineBytes + (half + l) * 32, j);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) sum[r][l] = sub_end(sum[r][l], dot[j][r][l], sub);
    }
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
