// Rotary embedding of heads: pairs (i, i + R/2), or (2i, 2i + 1) interleaved, are turned by the
// angles of a position; what lies beyond R stays.
#pragma once
#include "common.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// Cosines and sines of one position, [r] each; both of a pair have an entry of their own.
struct Angles {
  const void* cos;
  const void* sin;
  DType type;
  int64_t r;
};

/// y[i] = x[i] cos[i] - x[i + R/2] sin[i], y[i + R/2] = x[i + R/2] cos[i + R/2] + x[i] sin[i +
/// R/2].
inline void rotate_halves(const Angles& angles, const void* x, DType type, void* out,
                          DType out_type) {
  const DType t = angles.type;
  const int64_t r = angles.r, half = r / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t j = i + half;
    const F32 first = load_some(type, x, i, half), second = load_some(type, x, j, r);
    const F32 taken = second * load_some(t, angles.sin, i, half);
    const F32 added = first * load_some(t, angles.sin, j, r);
    const F32 turned = fma(first, load_some(t, angles.cos, i, half), negate(taken));
    store_some(out_type, out, j, fma(second, load_some(t, angles.cos, j, r), added), r);
    store_some(out_type, out, i, turned, half);
  }
}

/// y[2i] = x[2i] cos[2i] - x[2i + 1] sin[2i], y[2i + 1] = x[2i + 1] cos[2i + 1] + x[2i] sin[2i +
/// 1].
inline void rotate_neighbours(const Angles& angles, const void* x, DType type, void* out,
                              DType out_type) {
  alignas(64) constexpr float kSigns[kLanes] = {-1.0f, 1.0f, -1.0f, 1.0f, -1.0f, 1.0f, -1.0f, 1.0f,
                                                -1.0f, 1.0f, -1.0f, 1.0f, -1.0f, 1.0f, -1.0f, 1.0f};
  const DType t = angles.type;
  const int64_t r = angles.r;
  for (int64_t i = 0; i < r; i += kLanes) {
    const F32 v = load_some(type, x, i, r);
    const F32 other = swap_pairs(v) * (load_some(t, angles.sin, i, r) * load(kSigns));
    store_some(out_type, out, i, fma(v, load_some(t, angles.cos, i, r), other), r);
  }
}

/// One head of d elements; `out` may be `x` itself where the types agree.
inline void rotate_head(const Angles& angles, bool interleaved, const void* x, DType type,
                        void* out, DType out_type, int64_t d) {
  if (interleaved) {
    rotate_neighbours(angles, x, type, out, out_type);
  } else {
    rotate_halves(angles, x, type, out, out_type);
  }
  for (int64_t i = angles.r; i < d; i += kLanes) {
    store_some(out_type, out, i, load_some(type, x, i, d), d);
  }
}

inline void rotary(const RotaryArgs& args, int64_t begin, int64_t end) {
  const int64_t size = size_of(args.type), angle_size = size_of(args.angle_type);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % args.heads, position = item / args.heads;
    const int64_t l = position % args.length, b = position / args.length;
    const int64_t at = b * args.batch_stride + l * args.length_stride + head * args.head_stride;
    const int64_t angle_at = (b * args.angle_batch_stride + l * args.r) * angle_size;
    const Angles angles = {static_cast<const uint8_t*>(args.cos) + angle_at,
                           static_cast<const uint8_t*>(args.sin) + angle_at, args.angle_type,
                           args.r};
    rotate_head(angles, args.interleaved, static_cast<const uint8_t*>(args.x) + at * size,
                args.type, static_cast<uint8_t*>(args.out) + item * args.d * size, args.type,
                args.d);
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
