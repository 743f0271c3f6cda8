// y[i] = x[i] / sqrt(mean(x^2) + eps) * (offset + w[i]): rows normalised by their root mean square,
// alone, after an addition, or in fp32 scratch.
#pragma once
#include "common.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// 1 / sqrt(sum of squares / k + eps) of k elements, in all lanes.
inline F32 inverse_rms(const void* x, DType type, int64_t k, float eps) {
  F32 partials = splat(0.0f);
  for (int64_t i = 0; i < k; i += kLanes) {
    const F32 v = load_some(type, x, i, k);
    partials = fma(v, v, partials);
  }
  const F32 mean = splat(reduce16(partials)) / splat(static_cast<float>(k));
  return splat(1.0f) / sqrt(mean + splat(eps));
}

/// One row of k elements; `out` may be `x` itself where the types agree. With cast_before_weight
/// x / rms is rounded to `cast` first: the type that x has in the model, also where it comes here
/// as fp32 scratch.
inline void rms_norm_row(const NormWeight& norm, const void* x, DType type, DType cast, void* out,
                         DType out_type, int64_t k) {
  const F32 r = inverse_rms(x, type, k, norm.eps), offset = splat(norm.offset);
  const bool shifted = norm.offset != 0.0f;
  for (int64_t i = 0; i < k; i += kLanes) {
    F32 y = load_some(type, x, i, k) * r;
    if (norm.cast_before_weight) y = round_as(cast, y);
    F32 w = load_some(norm.type, norm.weight, i, k);
    if (shifted) w = offset + w;
    store_some(out_type, out, i, y * w, k);
  }
}

inline void rms_norm(const NormArgs& args, int64_t begin, int64_t end) {
  const int64_t size = size_of(args.type), out_size = size_of(args.out_type);
  for (int64_t row = begin; row < end; ++row) {
    rms_norm_row(args.norm, static_cast<const uint8_t*>(args.x) + row * args.stride * size,
                 args.type, args.type, static_cast<uint8_t*>(args.out) + row * args.k * out_size,
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
    for (int64_t i = 0; i < k; i += kLanes) {
      const F32 both = load_some(args.type, x, i, k) + load_some(args.type, residual, i, k);
      store_some(args.type, sum, i, both, k);
    }
    rms_norm_row(args.norm, sum, args.type, args.type,
                 static_cast<uint8_t*>(args.out) + row * k * size_of(args.out_type), args.out_type,
                 k);
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
