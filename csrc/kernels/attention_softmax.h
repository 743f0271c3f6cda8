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

/// The largest score, +inf for a NaN.
inline float largest_score(Range blocks, const float* s) {
  const F32 high = splat(kInfinity);
  F32 most = splat(-kInfinity);
  for (int64_t i = blocks.begin; i < blocks.end; i += kLanes) {
    const F32 x = load(s + i);
    most = max(most, select(is_nan(x), high, x));
  }
  return reduce_max(most);
}

/// exp(x) for an x that is no NaN and not above 0.
SLMOPS_INLINE F32 exp_below(F32 x) { return exp_inside(max(x, splat(-104.0f))); }

/// Scores to p = exp(s - max) in place, max and sum into `part`; returns whether no p is 0.
inline bool softmax(Range blocks, float* s, float* part) {
  const float m = largest_score(blocks, s);
  part[0] = m;
  if (m == -kInfinity) return true;
  if (m == kInfinity) {  // some p is a NaN, and so is the result
    const F32 nan = splat(kNan);
    for (int64_t i = blocks.begin; i < blocks.end; i += kLanes) store(s + i, nan);
    part[1] = kNan;
    return true;
  }
  F32 sums = splat(0.0f), least = splat(kInfinity);
  for (int64_t i = blocks.begin; i < blocks.end; i += kLanes) {
    const F32 p = exp_below(load(s + i) - splat(m));
    store(s + i, p);
    sums = sums + p;
    least = min(p, least);
  }
  part[1] = reduce_add(sums);
  return reduce_max(negate(least)) < 0.0f;
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
