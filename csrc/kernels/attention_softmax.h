// From raw products of a query with a split's keys to p = exp(s - max), their max and their sum.
#pragma once
#include "attention_inputs.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// Products times their factors to scores: softcap, additive mask, and -inf where a row may not
/// see.
inline void mask_scores(const AttentionArgs& args, const Item& item, int64_t row, int64_t first,
                        Range blocks, const Workspace& w, float* s) {
  const F32 cap = splat(args.softcap), low = splat(-kInfinity);
  for (int64_t i = blocks.begin; i < blocks.end && args.softcap > 0.0f; i += kLanes) {
    store(s + i, tanh(load(s + i) / cap) * cap);
  }
  const int64_t begin = w.begin[row], end = w.end[row];
  if (args.mask != nullptr && args.mask_is_bool) {
    const uint8_t* seen = mask_row(args, item, row);
    for (int64_t i = begin; i < end; ++i) s[i] = seen[first + i] != 0 ? s[i] : -kInfinity;
  } else if (args.mask != nullptr) {
    const DType type = args.mask_type;
    const uint8_t* bias = mask_row(args, item, row) + (first + begin) * size_of(type);
    for_lanes(end - begin, [&](int64_t i, auto lanes) {
      const F32 x = load_lanes(DType::f32, s + begin, i, lanes);
      const F32 add = load_lanes(type, bias, i, lanes);
      const F32 sum = select(add < splat(-0x1.fffffep+127f), low, x + add);
      store_lanes(DType::f32, s + begin, i, sum, lanes);
    });
  }
  const int64_t from = begin < end ? begin : blocks.end;
  for (int64_t i = blocks.begin; i < from; ++i) s[i] = -kInfinity;
  for (int64_t i = begin < end ? end : from; i < blocks.end; ++i) s[i] = -kInfinity;
}

/// Rows whose softmax is computed side by side: a row's chains and reductions leave the vector
/// units waiting for most of it, where a vector is one register.
constexpr int kSoftmaxRows = kFloatSums >= 16 ? 4 : 1;

/// Calls body(Int<rows>{}, row) for rows 0 .. count - 1, kSoftmaxRows or one at a time.
template <class Body>
SLMOPS_INLINE void for_softmax_rows(int64_t count, const Body& body) {
  int64_t row = 0;
  if constexpr (kSoftmaxRows > 1) {
    for (; row + kSoftmaxRows <= count; row += kSoftmaxRows) body(Int<kSoftmaxRows>{}, row);
  }
  for (; row < count; ++row) body(Int<1>{}, row);
}

/// m[r] = the largest score of a row, +inf for a NaN; returns whether all are finite.
template <int kRows>
SLMOPS_INLINE bool largest_scores(Range blocks, const float* s, float (&m)[kRows]) {
  const F32 high = splat(kInfinity);
  F32 most[kRows];
  for (int r = 0; r < kRows; ++r) most[r] = splat(-kInfinity);
  for (int64_t i = blocks.begin; i < blocks.end; i += kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F32 x = load(s + r * kScoreStride + i);
      most[r] = max(most[r], select(is_nan(x), high, x));
    }
  }
  bool finite = true;
  for (int r = 0; r < kRows; ++r) {
    m[r] = reduce_max(most[r]);
    finite &= m[r] > -kInfinity && m[r] < kInfinity;
  }
  return finite;
}

/// exp(x) for an x that is no NaN and not above 0.
SLMOPS_INLINE F32 exp_below(F32 x) { return exp_inside(max(x, splat(-104.0f))); }

/// p of a row whose largest score m is infinite.
inline void infinite_softmax(Range blocks, float m, float* s, float* part) {
  part[0] = m;
  if (m < 0.0f) return;         // nothing is seen
  const F32 nan = splat(kNan);  // some p is a NaN, and so is the result
  for (int64_t i = blocks.begin; i < blocks.end; i += kLanes) store(s + i, nan);
  part[1] = kNan;
}

/// Scores to p = exp(s - max) in place, max and sum into `part`; returns whether no p is 0.
template <int kRows>
SLMOPS_INLINE bool softmax(Range blocks, float* s, float* part, int64_t part_stride) {
  float m[kRows];
  if (!largest_scores(blocks, s, m)) {
    bool positive = true;
    for (int r = 0; r < kRows; ++r) {
      float *row = s + r * kScoreStride, *own = part + r * part_stride;
      if constexpr (kRows > 1) {
        positive &= softmax<1>(blocks, row, own, part_stride);
      } else {
        infinite_softmax(blocks, m[r], row, own);
      }
    }
    return positive;
  }
  F32 sums[kRows], least[kRows];
  for (int r = 0; r < kRows; ++r) {
    sums[r] = splat(0.0f);
    least[r] = splat(kInfinity);
  }
  for (int64_t i = blocks.begin; i < blocks.end; i += kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      float* at = s + r * kScoreStride + i;
      const F32 p = exp_below(load(at) - splat(m[r]));
      store(at, p);
      sums[r] = sums[r] + p;
      least[r] = min(p, least[r]);
    }
  }
  F32 all = least[0];
  for (int r = 0; r < kRows; ++r) {
    part[r * part_stride] = m[r];
    part[r * part_stride + 1] = reduce_add(sums[r]);
    all = min(least[r], all);
  }
  return reduce_max(negate(all)) < 0.0f;
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
