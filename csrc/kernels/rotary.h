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
template <DType kType, DType kAngleType, DType kOutType>
SLMOPS_INLINE void rotate_halves(const Angles& angles, const void* x, void* out) {
  const int64_t half = angles.r / 2;
  for_lanes(half, [&](int64_t i, auto lanes) {
    const auto cos = [&](int64_t at) { return load_lanes(kAngleType, angles.cos, at, lanes); };
    const auto sin = [&](int64_t at) { return load_lanes(kAngleType, angles.sin, at, lanes); };
    const int64_t j = i + half;
    const F32 first = load_lanes(kType, x, i, lanes), second = load_lanes(kType, x, j, lanes);
    store_lanes(kOutType, out, i, fma(first, cos(i), negate(second * sin(i))), lanes);
    store_lanes(kOutType, out, j, fma(second, cos(j), first * sin(j)), lanes);
  });
}

/// y[2i] = x[2i] cos[2i] - x[2i + 1] sin[2i], y[2i + 1] = x[2i + 1] cos[2i + 1] + x[2i] sin[2i +
/// 1].
template <DType kType, DType kAngleType, DType kOutType>
SLMOPS_INLINE void rotate_neighbours(const Angles& angles, const void* x, void* out) {
  alignas(64) constexpr float kSigns[kLanes] = {-1.0f, 1.0f, -1.0f, 1.0f, -1.0f, 1.0f, -1.0f, 1.0f,
                                                -1.0f, 1.0f, -1.0f, 1.0f, -1.0f, 1.0f, -1.0f, 1.0f};
  const F32 signs = load(kSigns);
  for_lanes(angles.r, [&](int64_t i, auto lanes) {
    const F32 v = load_lanes(kType, x, i, lanes);
    const F32 sin = load_lanes(kAngleType, angles.sin, i, lanes) * signs;
    const F32 cos = load_lanes(kAngleType, angles.cos, i, lanes);
    store_lanes(kOutType, out, i, fma(v, cos, swap_pairs(v) * sin), lanes);
  });
}

/// One head of d elements; `out` may be `x` itself where the types agree.
template <DType kType, DType kAngleType, DType kOutType>
inline void rotate_head(const Angles& angles, bool interleaved, const void* x, void* out,
                        int64_t d) {
  if (interleaved) {
    rotate_neighbours<kType, kAngleType, kOutType>(angles, x, out);
  } else {
    rotate_halves<kType, kAngleType, kOutType>(angles, x, out);
  }
  const int64_t r = angles.r;
  for_lanes(d - r, [&](int64_t i, auto lanes) {
    store_lanes(kOutType, out, r + i, load_lanes(kType, x, r + i, lanes), lanes);
  });
}

template <DType kType, DType kAngleType>
inline void rotate_items(const RotaryArgs& args, int64_t begin, int64_t end) {
  const int64_t size = size_of(kType), angle_size = size_of(kAngleType);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % args.heads, position = item / args.heads;
    const int64_t l = position % args.length, b = position / args.length;
    const int64_t at = b * args.batch_stride + l * args.length_stride + head * args.head_stride;
    const int64_t angle_at = (b * args.angle_batch_stride + l * args.r) * angle_size;
    const Angles angles = {static_cast<const uint8_t*>(args.cos) + angle_at,
                           static_cast<const uint8_t*>(args.sin) + angle_at, kAngleType, args.r};
    rotate_head<kType, kAngleType, kType>(
        angles, args.interleaved, static_cast<const uint8_t*>(args.x) + at * size,
        static_cast<uint8_t*>(args.out) + item * args.d * size, args.d);
  }
}

inline void rotary(const RotaryArgs& args, int64_t begin, int64_t end) {
  with_type(args.type, [&](auto type) {
    with_type(args.angle_type, [&](auto angle_type) {
      rotate_items<decltype(type)::value, decltype(angle_type)::value>(args, begin, end);
    });
  });
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
