// Heads of q, k and v from fp32 scratch: norm, rotary embedding, one rounding.
#pragma once
#include "rms_norm.h"
#include "rotary.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// A row as sequence and position in it.
struct Place {
  int64_t sequence, position;
};

/// The angles of a row; none where args have none.
inline Angles angles_at(const HeadsArgs& args, Place row) {
  if (args.cos == nullptr) return {nullptr, nullptr, DType::f32, 0};
  const int64_t at =
      (row.sequence * args.angle_batch_stride + row.position * args.r) * size_of(args.angle_type);
  return {static_cast<const uint8_t*>(args.cos) + at, static_cast<const uint8_t*>(args.sin) + at,
          args.angle_type, args.r};
}

/// One head of d elements of kSize bytes into slot `slot` of the blocks of keys at `place`.
template <int64_t kSize>
inline void scatter_key(const uint8_t* x, int64_t d, int64_t slot, uint8_t* place) {
  uint8_t* to = place + (slot / kKeyBlock * kKeyBlock * d + slot % kKeyBlock) * kSize;
  for (int64_t e = 0; e < d; ++e) memcpy(to + e * kKeyBlock * kSize, x + e * kSize, size_t{kSize});
}

/// Heads [begin, end) of part `part` (0: q, 1: k, 2: v) of one row, at x.
template <DType kType, DType kAngleType>
inline void finish_part(const HeadsArgs& args, int part, Place row, int64_t begin, int64_t end,
                        const Angles& angles, float* x) {
  const int64_t d = args.d;
  const bool rotated = part < 2;
  const int64_t width = rotated ? args.norm_width[part] : 0;
  if (width > d) rms_norm_row(args.norm[part], x, DType::f32, x, DType::f32, width);
  const HeadsOut& to = args.out[part];
  constexpr int64_t kSize = size_of(kType);
  alignas(64) uint8_t key[kMostKeyElements * sizeof(float)];
  const int64_t at =
      row.sequence * to.batch_stride + (to.blocked ? 0 : row.position * to.length_stride);
  for (int64_t head = begin; head < end; ++head, x += d) {
    uint8_t* place = static_cast<uint8_t*>(to.data) + (at + head * to.head_stride) * kSize;
    uint8_t* out = to.blocked ? key : place;
    if (width == d) rms_norm_row(args.norm[part], x, DType::f32, x, DType::f32, d);
    if (rotated && angles.r > 0) {
      rotate_head<DType::f32, kAngleType, kType>(angles, args.interleaved, x, out, d);
    } else {
      convert(x, DType::f32, out, kType, d);
    }
    if (to.blocked) scatter_key<kSize>(key, d, to.first_slot + row.position, place);
  }
}

template <DType kType, DType kAngleType>
inline void finish_heads(const HeadsArgs& args, float* x, int64_t stride, int64_t row, int64_t rows,
                         int64_t head, int64_t count) {
  Place place = {row / args.length, row % args.length};
  for (int64_t i = 0; i < rows; ++i) {
    const Angles angles = angles_at(args, place);
    int64_t part_begin = 0;  // in heads of the whole row
    for (int part = 0; part < 3; ++part) {
      const int64_t part_end = part_begin + args.heads[part];
      const int64_t begin = head > part_begin ? head : part_begin;
      const int64_t end = head + count < part_end ? head + count : part_end;
      if (begin < end) {
        finish_part<kType, kAngleType>(args, part, place, begin - part_begin, end - part_begin,
                                       angles, x + i * stride + (begin - head) * args.d);
      }
      part_begin = part_end;
    }
    if (++place.position == args.length) place = {place.sequence + 1, 0};
  }
}

inline void heads(const HeadsArgs& args, float* x, int64_t stride, int64_t row, int64_t rows,
                  int64_t head, int64_t count) {
  with_type(args.type, [&](auto type) {
    with_type(args.angle_type, [&](auto angle_type) {
      finish_heads<decltype(type)::value, decltype(angle_type)::value>(args, x, stride, row, rows,
                                                                       head, count);
    });
  });
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
