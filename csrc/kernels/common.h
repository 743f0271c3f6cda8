// What all kernels share: typed loads and stores with tails, unrolling by row count.
#pragma once
#include <limits>

#include "../simd/math.h"
#include "kernels.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

constexpr int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

/// Calls body(Int<n>{}) for a run-time n in 1..kMax.
template <int kMax, class Body>
SLMOPS_INLINE void with_constant(int64_t n, const Body& body) {
  if constexpr (kMax > 1) {
    if (n < kMax) return with_constant<kMax - 1>(n, body);
  }
  body(Int<kMax>{});
}

/// 16 scales or float zero points, f16 or bf16.
SLMOPS_INLINE F32 load_scale(DType t, const uint8_t* p) {
  return t == DType::f16 ? load_f16(p) : load_bf16(p);
}

inline void store_scale(DType t, uint8_t* p, F32 x) {
  if (t == DType::f16) return store_f16(p, x);
  store_bf16(p, x);
}

/// 16 elements of type t from element `index` on, as fp32.
SLMOPS_INLINE F32 load_as(DType t, const void* p, int64_t index) {
  const uint8_t* q = static_cast<const uint8_t*>(p) + index * size_of(t);
  if (t == DType::bf16) return load_bf16(q);
  if (t == DType::f16) return load_f16(q);
  return load(reinterpret_cast<const float*>(q));
}

/// The first `count` of 16 elements, the rest +0.
inline F32 load_tail(DType t, const void* p, int64_t index, int64_t count) {
  alignas(64) uint8_t padded[64] = {};
  memcpy(padded, static_cast<const uint8_t*>(p) + index * size_of(t),
         static_cast<size_t>(count * size_of(t)));
  return load_as(t, padded, 0);
}

SLMOPS_INLINE void store_as(DType t, void* p, int64_t index, F32 x) {
  uint8_t* q = static_cast<uint8_t*>(p) + index * size_of(t);
  if (t == DType::bf16) return store_bf16(q, x);
  if (t == DType::f16) return store_f16(q, x);
  store(reinterpret_cast<float*>(q), canonical_nan(x));
}

inline void store_tail(DType t, void* p, int64_t index, F32 x, int64_t count) {
  alignas(64) uint8_t full[64];
  store_as(t, full, 0, x);
  memcpy(static_cast<uint8_t*>(p) + index * size_of(t), full,
         static_cast<size_t>(count * size_of(t)));
}

/// What for_lanes calls its body with: all 16 lanes, or the first `count`.
struct Whole {};
struct Part {
  int64_t count;
};
SLMOPS_INLINE F32 load_lanes(DType t, const void* p, int64_t index, Whole) {
  return load_as(t, p, index);
}
SLMOPS_INLINE F32 load_lanes(DType t, const void* p, int64_t index, Part part) {
  return load_tail(t, p, index, part.count);
}
SLMOPS_INLINE void store_lanes(DType t, void* p, int64_t index, F32 x, Whole) {
  store_as(t, p, index, x);
}
SLMOPS_INLINE void store_lanes(DType t, void* p, int64_t index, F32 x, Part part) {
  store_tail(t, p, index, x, part.count);
}

/// Calls body(i, lanes) for i = 0, 16, ... below k.
template <class Body>
SLMOPS_INLINE void for_lanes(int64_t k, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) body(i, Whole{});
  if (i < k) body(i, Part{k - i});
}

template <DType kType>
struct TypeConstant {
  static constexpr DType value = kType;
};

/// Calls body(TypeConstant<t>{}): a loop inside does not ask for the type of each vector.
template <class Body>
SLMOPS_INLINE void with_type(DType t, const Body& body) {
  if (t == DType::bf16) return body(TypeConstant<DType::bf16>{});
  if (t == DType::f16) return body(TypeConstant<DType::f16>{});
  body(TypeConstant<DType::f32>{});
}

/// Elements [k, k + 16) of row `row` of the activations, permuted, +0 beyond `columns`.
inline F32 load_columns(const SourceRows& src, int64_t row, int64_t k, int64_t columns) {
  const uint8_t* base = static_cast<const uint8_t*>(src.x) + row * src.stride * size_of(src.type);
  const int64_t count = columns - k < kLanes ? columns - k : kLanes;
  if (count <= 0) return splat(0.0f);
  if (src.perm == nullptr) {
    return count == kLanes ? load_as(src.type, base, k) : load_tail(src.type, base, k, count);
  }
  alignas(64) uint8_t gathered[64] = {};
  const int64_t size = size_of(src.type);
  for (int64_t i = 0; i < count; ++i) {
    memcpy(gathered + i * size, base + src.perm[k + i] * size, static_cast<size_t>(size));
  }
  return load_as(src.type, gathered, 0);
}

/// A row of the activations, 16 columns at a time: as load_columns gives them.
struct AnyRow {
  const SourceRows& src;
  int64_t row, columns;

  F32 operator()(int64_t k) const { return load_columns(src, row, k, columns); }
};

/// The same where all columns asked for exist, in order.
template <DType kType>
struct PlainRow {
  const void* x;

  SLMOPS_INLINE F32 operator()(int64_t k) const { return load_as(kType, x, k); }
};

/// Calls body(row) with the quickest form of row `row` whose columns [0, end) are read.
template <class Body>
SLMOPS_INLINE void with_row(const SourceRows& src, int64_t row, int64_t columns, int64_t end,
                            const Body& body) {
  if (src.perm != nullptr || end > columns) return body(AnyRow{src, row, columns});
  const uint8_t* x = static_cast<const uint8_t*>(src.x) + row * src.stride * size_of(src.type);
  with_type(src.type, [&](auto type) { body(PlainRow<decltype(type)::value>{x}); });
}

/// x rounded once to type t, as fp32 again.
SLMOPS_INLINE F32 round_as(DType t, F32 x) {
  if (t == DType::bf16) {  // as store_bf16, but in registers
    const I32 bits = bits_of(canonical_nan(x));
    const I32 odd = shift_right<16>(bits) & splat_i32(1);
    return from_bits((bits + odd + splat_i32(0x7fff)) & splat_i32(-0x10000));
  }
  alignas(64) uint8_t rounded[64];
  store_as(t, rounded, 0, x);
  return load_as(t, rounded, 0);
}

inline void convert(const void* in, DType in_type, void* out, DType out_type, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_as(out_type, out, i, load_as(in_type, in, i));
  if (i < count) store_tail(out_type, out, i, load_tail(in_type, in, i, count - i), count - i);
}

template <int kRows, int kVectors>
SLMOPS_INLINE void clear(F32 (&sum)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[r][j] = splat(0.0f);
  }
}

/// sum[r] += a[r * stride] * x, one fma each.
template <int kRows, int kVectors>
SLMOPS_INLINE void add_products(const float* a, int64_t stride, const F32 (&x)[kVectors],
                                F32 (&sum)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const F32 factor = splat(a[r * stride]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[r][j] = fma(factor, x[j], sum[r][j]);
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
