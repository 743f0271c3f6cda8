// y[i] = x[i] / sqrt(mean(x^2) + eps) * (offset + w[i]): rows normalised by their root mean square,
// alone, after an addition, or in fp32 scratch; and the addition alone.
#pragma once
#include "common.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// 1 / sqrt(sum of squares / k + eps) of k elements, in all lanes.
inline F32 inverse_rms(const void* x, DType type, int64_t k, float eps) {
  F32 partials = splat(0.0f);
  with_type(type, [&](auto constant) {
    constexpr DType kType = decltype(constant)::value;
    for_lanes(k, [&](int64_t i, auto lanes) {
      const F32 v = load_lanes(kType, x, i, lanes);
      partials = fma(v, v, partials);
    });
  });
  const F32 mean = splat(reduce_add(partials)) / splat(static_cast<float>(k));
  return splat(1.0f) / sqrt(mean + splat(eps));
}

/// out = x * r, rounded to norm.cast, times the weight.
template <DType kType, DType kWeightType>
inline void scale_row(const NormWeight& norm, F32 r, const void* x, void* out, DType out_type,
                      int64_t k) {
  const F32 offset = splat(norm.offset);
  const DType cast = norm.cast;
  const bool shifted = norm.offset != 0.0f;
  with_type(out_type, [&](auto constant) {
    constexpr DType kOutType = decltype(constant)::value;
    for_lanes(k, [&](int64_t i, auto lanes) {
      F32 y = load_lanes(kType, x, i, lanes) * r;
      if (cast != DType::f32) y = round_as(cast, y);
      F32 w = load_lanes(kWeightType, norm.weight, i, lanes);
      if (shifted) w = offset + w;
      store_lanes(kOutType, out, i, y * w, lanes);
    });
  });
}

/// One row of k elements; `out` may be `x` itself where the types agree: fp32 scratch in place.
inline void rms_norm_row(const NormWeight& norm, const void* x, DType type, void* out,
                         DType out_type, int64_t k) {
  const F32 r = inverse_rms(x, type, k, norm.eps);
  with_type(type, [&](auto constant) {
    with_type(norm.type, [&](auto weight) {
      scale_row<decltype(constant)::value, decltype(weight)::value>(norm, r, x, out, out_type, k);
    });
  });
}

inline void rms_norm(const NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    rms_norm_row(args.norm,
                 static_cast<const uint8_t*>(args.x) + row * args.stride * size_of(args.type),
                 args.type, static_cast<uint8_t*>(args.out) + row * args.k * size_of(args.out_type),
                 args.out_type, args.k);
  }
}

inline void add_rms_norm(const AddNormArgs& add, int64_t begin, int64_t end) {
  const NormArgs& args = add.norm;
  const int64_t size = size_of(args.type), k = args.k;
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* x = static_cast<const uint8_t*>(args.x) + row * args.stride * size;
    const uint8_t* residual =
        static_cast<const uint8_t*>(add.residual) + row * add.residual_stride * size;
    uint8_t* sum = static_cast<uint8_t*>(add.sum) + row * k * size;
    with_type(args.type, [&](auto constant) {
      constexpr DType kType = decltype(constant)::value;
      for_lanes(k, [&](int64_t i, auto lanes) {
        const F32 both = load_lanes(kType, x, i, lanes) + load_lanes(kType, residual, i, lanes);
        store_lanes(kType, sum, i, both, lanes);
      });
    });
    rms_norm_row(args.norm, sum, args.type,
                 static_cast<uint8_t*>(args.out) + row * k * size_of(args.out_type), args.out_type,
                 k);
  }
}

inline void add(const SumArgs& args, int64_t begin, int64_t end) {
  const int64_t from = begin * args.k * size_of(args.type);
  const uint8_t* x = static_cast<const uint8_t*>(args.x) + from;
  const uint8_t* branch = static_cast<const uint8_t*>(args.branch) + from;
  uint8_t* out = static_cast<uint8_t*>(args.out) + from;
  const F32 factor = splat(args.factor);
  with_type(args.type, [&](auto constant) {
    constexpr DType kType = decltype(constant)::value;
    for_lanes((end - begin) * args.k, [&](int64_t i, auto lanes) {
      F32 y = load_lanes(kType, branch, i, lanes);
      if (args.factor != 1.0f) y = round_as(kType, y * factor);
      store_lanes(kType, out, i, load_lanes(kType, x, i, lanes) + y, lanes);
    });
  });
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
