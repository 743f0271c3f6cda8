// Heads of q, k and v from fp32 scratch: norm, rotary embedding, one rounding.
#pragma once
#include "int8_heads.h"
#include "rms_norm.h"
#include "rotary.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// The angles of row `row`; none where args have none.
inline Angles angles_at(const HeadsArgs& args, int64_t row) {
  if (args.cos == nullptr) return {nullptr, nullptr, DType::f32, 0};
  const int64_t at = (row / args.length * args.angle_batch_stride + row % args.length * args.r) *
                     size_of(args.angle_type);
  return {static_cast<const uint8_t*>(args.cos) + at, static_cast<const uint8_t*>(args.sin) + at,
          args.angle_type, args.r};
}

/// One head of d elements of kSize bytes into slot `slot` of the blocks of keys at `place`.
template <size_t kSize>
inline void scatter_key(const uint8_t* x, int64_t d, int64_t slot, uint8_t* place) {
  constexpr int64_t kBytes = int64_t{kSize};
  uint8_t* to = place + (slot / kKeyBlock * kKeyBlock * d + slot % kKeyBlock) * kBytes;
  for (int64_t e = 0; e < d; ++e) memcpy(to + e * kKeyBlock * kBytes, x + e * kBytes, kSize);
}

/// A finished head into slot `slot` of a cache that is not plain; `place`: of blocks of keys.
inline void place_head(const HeadsArgs& args, const HeadsOut& to, const uint8_t* x, int64_t b,
                       int64_t head, int64_t slot, uint8_t* place) {
  if (to.layout == HeadsLayout::key_blocks) {
    if (size_of(args.type) == 2) return scatter_key<2>(x, args.d, slot, place);
    return scatter_key<4>(x, args.d, slot, place);
  }
  const Int8View& out = to.int8;
  uint8_t* codes = out.codes + b * out.batch_stride + head * out.head_stride;
  const bool values = to.layout == HeadsLayout::int8_values;
  out.scale[b * out.scale_batch_stride + head * out.scale_head_stride + slot] =
      store_int8_head(x, args.type, args.d, slot, values, codes);
}

/// Heads [begin, end) of part `part` (0: q, 1: k, 2: v) of one row, at x.
inline void finish_part(const HeadsArgs& args, int part, int64_t row, int64_t begin, int64_t end,
                        const Angles& angles, float* x) {
  const int64_t d = args.d;
  const bool rotated = part < 2;
  const int64_t width = rotated ? args.norm_width[part] : 0;
  if (width > d) rms_norm_row(args.norm[part], x, DType::f32, x, DType::f32, width);
  const HeadsOut& to = args.out[part];
  const int64_t l = row % args.length, size = size_of(args.type);
  const bool plain = to.layout == HeadsLayout::plain;
  alignas(64) uint8_t finished[kMostKeyElements * sizeof(float)];
  const int64_t b = row / args.length;
  const int64_t at = b * to.batch_stride + (plain ? l * to.length_stride : 0);
  for (; begin < end; ++begin, x += d) {
    uint8_t* place = static_cast<uint8_t*>(to.data) + (at + begin * to.head_stride) * size;
    uint8_t* out = plain ? place : finished;
    if (width == d) rms_norm_row(args.norm[part], x, DType::f32, x, DType::f32, d);
    if (rotated && angles.r > 0) {
      rotate_head(angles, args.interleaved, x, DType::f32, out, args.type, d);
    } else {
      convert(x, DType::f32, out, args.type, d);
    }
    if (!plain) place_head(args, to, finished, b, begin, to.first_slot + l, place);
  }
}

inline void heads(const HeadsArgs& args, float* x, int64_t stride, int64_t row, int64_t rows,
                  int64_t head, int64_t count) {
  for (int64_t i = 0; i < rows; ++i) {
    const Angles angles = angles_at(args, row + i);
    int64_t part_begin = 0;  // in heads of the whole row
    for (int part = 0; part < 3; ++part) {
      const int64_t part_end = part_begin + args.heads[part];
      const int64_t begin = head > part_begin ? head : part_begin;
      const int64_t end = head + count < part_end ? head + count : part_end;
      if (begin < end) {
        finish_part(args, part, row + i, begin - part_begin, end - part_begin, angles,
                    x + i * stride + (begin - head) * args.d);
      }
      part_begin = part_end;
    }
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
