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
template <DType kType, DType kAngleType>
inline void rotate_halves(const Angles& angles, const void* x, void* out, DType out_type) {
  const int64_t half = angles.r / 2;
  for_lanes(half, [&](int64_t i, auto lanes) {
    const auto cos = [&](int64_t at) { return load_lanes(kAngleType, angles.cos, at, lanes); };
    const auto sin = [&](int64_t at) { return load_lanes(kAngleType, angles.sin, at, lanes); };
    const int64_t j = i + half;
    const F32 first = load_lanes(kType, x, i, lanes), second = load_lanes(kType, x, j, lanes);
    store_lanes(out_type, out, i, fma(first, cos(i), negate(second * sin(i))), lanes);
    store_lanes(out_type, out, j, fma(second, cos(j), first * sin(j)), lanes);
  });
}

/// y[2i] = x[2i] cos[2i] - x[2i + 1] sin[2i], y[2i + 1] = x[2i + 1] cos[2i + 1] + x[2i] sin[2i +
/// 1].
template <DType kType, DType kAngleType>
inline void rotate_neighbours(const Angles& angles, const void* x, void* out, DType out_type) {
  alignas(64) constexpr float kSigns[kLanes] = {-1.0f, 1.0f, -1.0f, 1.0f, -1.0f, 1.0f, -1.0f, 1.0f,
                                                -1.0f, 1.0f, -1.0f, 1.0f, -1.0f, 1.0f, -1.0f, 1.0f};
  const F32 signs = load(kSigns);
  for_lanes(angles.r, [&](int64_t i, auto lanes) {
    const F32 v = load_lanes(kType, x, i, lanes);
    const F32 sin = load_lanes(kAngleType, angles.sin, i, lanes) * signs;
    const F32 cos = load_lanes(kAngleType, angles.cos, i, lanes);
    store_lanes(out_type, out, i, fma(v, cos, swap_pairs(v) * sin), lanes);
  });
}

/// One head of d elements; `out` may be `x` itself where the types agree: fp32 scratch in place.
inline void rotate_head(const Angles& angles, bool interleaved, const void* x, DType type,
                        void* out, DType out_type, int64_t d) {
  with_type(type, [&](auto constant) {
    constexpr DType kType = decltype(constant)::value;
    with_type(angles.type, [&](auto angle) {
      constexpr DType kAngleType = decltype(angle)::value;
      if (interleaved) {
        rotate_neighbours<kType, kAngleType>(angles, x, out, out_type);
      } else {
        rotate_halves<kType, kAngleType>(angles, x, out, out_type);
      }
    });
    const int64_t r = angles.r;
    for_lanes(d - r, [&](int64_t i, auto lanes) {
      store_lanes(out_type, out, r + i, load_lanes(kType, x, r + i, lanes), lanes);
    });
  });
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
