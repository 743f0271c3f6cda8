// Codes and scales of weights, as docs/arithmetic.md, "Choosing codes", defines them.
//
// Lanes are 16 outputs; every sum runs over k upwards inside its lane. A block of 16 rows is
// transposed once
// ([k][16]), so that the searches read it in order.
#pragma once
#include "common.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr float kTinyWeight = 0x1p-100f;

constexpr float kInt4Symmetric[] = {-8.0f, -7.75f, -7.5f, -7.25f, -7.0f,  -6.75f, -6.5f,  -8.25f,
                                    -8.5f, -8.75f, -9.0f, -9.25f, -10.0f, -11.5f, -13.5f, -16.0f};
constexpr float kInt8Symmetric[] = {-128.0f, -127.0f, -126.0f, -124.0f,
                                    -129.0f, -130.0f, -132.0f, -134.0f};
constexpr float kInt4Asymmetric[] = {1.0f,    0.90625f, 0.9375f, 0.96875f, 1.03125f,
                                     1.0625f, 1.09375f, 1.125f,  1.1875f,  1.25f,
                                     1.375f,  1.5f,     1.875f,  2.5f};
constexpr float kInt8Asymmetric[] = {1.0f,        0.9875f, 0.9925f, 0.99625f,
                                     1.00390625f, 1.01f,   1.02f,   1.04f};
constexpr float kSub16Scales[] = {7.5f, 6.0f, 6.375f, 6.75f, 7.125f, 7.875f, 8.25f, 8.625f, 9.0f};
constexpr float kSub16Steps[] = {15.0f, 15.25f, 15.625f, 16.0f, 16.75f, 18.25f, 14.75f, 14.125f};
constexpr int kStepCount = sizeof(kSub16Steps) / sizeof(float);

struct Divisors {
  const float* values;
  int count;
};

template <int kCount>
constexpr Divisors table(const float (&values)[kCount]) {
  return {values, kCount};
}

/// 16 rows, transposed, with the scratch of their searches.
struct WeightBlock {
  float* x;                 // [k][16]
  float* y;                 // [k][16], x normalised for a search
  float* scales;            // [groups][16]
  const float* importance;  // [k] or null
  int64_t row, rows;        // first row, how many of the 16 exist
};

/// The nearest integer of x clamped to [low, high], which are integers.
SLMOPS_INLINE F32 clamp_round(F32 x, F32 low, F32 high) {
  return to_f32(round(min(max(x, low), high)));
}
/// 1 / x, or +0 where x is 0.
SLMOPS_INLINE F32 inverse_or_zero(F32 x) {
  return select(splat(0.0f) < abs(x), splat(1.0f) / x, splat(0.0f));
}

inline WeightBlock load_block(const QuantizeArgs& args, int64_t row) {
  const int64_t rows = args.n - row < kLanes ? args.n - row : kLanes;
  float* x = args.scratch;
  float* y = x + args.k * kLanes;
  const SourceRows src = {args.w, args.type, args.stride, nullptr};
  for (int64_t k = 0; k < args.k; k += kLanes) {
    const int64_t count = args.k - k < kLanes ? args.k - k : kLanes;
    for (int64_t r = 0; r < kLanes; ++r) {
      float values[kLanes];
      store(values, r < rows ? load_columns(src, row + r, k, args.k) : splat(0.0f));
      for (int64_t i = 0; i < count; ++i) x[(k + i) * kLanes + r] = values[i];
    }
  }
  return {x, y, y + args.k * kLanes, args.importance, row, rows};
}

inline F32 largest_magnitude(const float* x, int64_t begin, int64_t end) {
  F32 largest = splat(0.0f);
  for (int64_t k = begin; k < end; ++k) largest = max(abs(load(x + k * kLanes)), largest);
  return largest;
}

/// base times the least-squares ratio of the best divisor for y[begin, end), or `fallback` where
/// none was taken.
inline F32 search_scale(const WeightBlock& block, int64_t begin, int64_t end, Divisors divisors,
                        F32 low, F32 high, F32 base, F32 fallback) {
  F32 best = splat(0.0f), scale = fallback;
  for (int i = 0; i < divisors.count; ++i) {
    const F32 d = splat(divisors.values[i]);
    F32 lx = splat(0.0f), l2 = splat(0.0f);
    if (block.importance == nullptr) {
      for (int64_t k = begin; k < end; ++k) {
        const F32 y = load(block.y + k * kLanes);
        const F32 q = clamp_round(y * d, low, high);
        lx = fma(y, q, lx);
        l2 = fma(q, q, l2);
      }
    } else {
      for (int64_t k = begin; k < end; ++k) {
        const F32 y = load(block.y + k * kLanes), h = splat(block.importance[k]);
        const F32 q = clamp_round(y * d, low, high);
        lx = fma(h * y, q, lx);
        l2 = fma(h * q, q, l2);
      }
    }
    const F32 ratio = lx / l2, score = lx * ratio;
    const Mask better = best < select(score < splat(kInfinity), score, splat(-1.0f));
    best = select(better, score, best);
    scale = select(better, base * ratio, scale);
  }
  return scale;
}

/// Writes x * inverse, clamped and rounded, plus zero, as the codes of columns [begin, end).
inline void write_codes(const QuantizeArgs& args, const WeightBlock& block, int64_t begin,
                        int64_t end, F32 inverse, F32 low, F32 high, F32 zero) {
  for (int64_t k = begin; k < end; k += kLanes) {
    const int64_t count = end - k < kLanes ? end - k : kLanes;
    int8_t chunk[kLanes * kLanes];
    for (int64_t i = 0; i < count; ++i) {
      const F32 x = load(block.x + (k + i) * kLanes);
      store_i8(chunk + i * kLanes, round(clamp_round(x * inverse, low, high) + zero));
    }
    for (int64_t r = 0; r < block.rows; ++r) {
      uint8_t* codes = args.out.codes + (block.row + r) * args.k + k;
      for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(chunk[i * kLanes + r]);
    }
  }
}

/// What a group's codes are measured by: scale in fp32, zero point and range of q.
struct GroupScale {
  F32 scale, zero, low, high;
};

inline GroupScale symmetric_scale(const QuantizeArgs& args, const WeightBlock& block, int64_t begin,
                                  int64_t end) {
  F32 amax = splat(0.0f), extreme = splat(0.0f);
  for (int64_t k = begin; k < end; ++k) {
    const F32 x = load(block.x + k * kLanes), magnitude = abs(x);
    const Mask larger = amax < magnitude;
    amax = select(larger, magnitude, amax);
    extreme = select(larger, x, extreme);
  }
  const float half = args.bits == 4 ? 8.0f : 128.0f;
  const F32 low = splat(-half), high = splat(half - 1.0f);
  const Mask tiny = amax < splat(kTinyWeight);
  F32 scale = amax / high;
  if (args.mse) {
    const F32 base = select(tiny, splat(1.0f), extreme), r = splat(1.0f) / base;
    for (int64_t k = begin; k < end; ++k)
      store(block.y + k * kLanes, load(block.x + k * kLanes) * r);
    scale = search_scale(block, begin, end,
                         args.bits == 4 ? table(kInt4Symmetric) : table(kInt8Symmetric), low, high,
                         base, scale);
  }
  return {select(tiny, splat(0.0f), scale), splat(half), low, high};
}

inline GroupScale asymmetric_scale(const QuantizeArgs& args, const WeightBlock& block,
                                   int64_t begin, int64_t end) {
  F32 highest = splat(0.0f), lowest = splat(0.0f);
  for (int64_t k = begin; k < end; ++k) {
    const F32 x = load(block.x + k * kLanes);
    highest = select(highest < x, x, highest);
    lowest = select(x < lowest, x, lowest);
  }
  const F32 codes = splat(args.bits == 4 ? 15.0f : 255.0f);
  const Mask tiny = max(highest, negate(lowest)) < splat(kTinyWeight);
  const F32 base = select(tiny, splat(1.0f), highest / codes - lowest / codes),
            r = splat(1.0f) / base;
  const F32 zero = select(tiny, splat(0.0f), clamp_round(negate(lowest) * r, splat(0.0f), codes));
  const F32 low = negate(zero), high = codes - zero;
  F32 scale = base;
  if (args.mse) {
    for (int64_t k = begin; k < end; ++k)
      store(block.y + k * kLanes, load(block.x + k * kLanes) * r);
    scale = search_scale(block, begin, end,
                         args.bits == 4 ? table(kInt4Asymmetric) : table(kInt8Asymmetric), low,
                         high, base, scale);
  }
  return {select(tiny, splat(0.0f), scale), zero, low, high};
}

inline void widen_range(F32 scale, int64_t rows, float* range) {
  float values[kLanes];
  store(values, abs(scale));
  for (int64_t r = 0; r < rows; ++r) {
    if (values[r] == 0.0f) continue;
    if (values[r] < range[0]) range[0] = values[r];
    if (values[r] > range[1]) range[1] = values[r];
  }
}

inline void quantize_groups(const QuantizeArgs& args, const WeightBlock& block, float* range) {
  const int64_t groups = (args.k + args.group - 1) / args.group;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * args.group;
    const int64_t end = args.k - begin < args.group ? args.k : begin + args.group;
    const GroupScale s = args.symmetric ? symmetric_scale(args, block, begin, end)
                                        : asymmetric_scale(args, block, begin, end);
    if (range != nullptr) widen_range(s.scale, block.rows, range);
    uint16_t rounded[kLanes];
    uint8_t* bytes_of_rounded = reinterpret_cast<uint8_t*>(rounded);
    store_scale(args.scale_type, bytes_of_rounded, s.scale);
    const F32 inverse = inverse_or_zero(load_scale(args.scale_type, bytes_of_rounded));
    float zero[kLanes];
    store(zero, s.zero);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t at = (block.row + r) * groups + g;
      static_cast<uint16_t*>(args.out.scale)[at] = rounded[r];
      if (!args.symmetric)
        static_cast<int16_t*>(args.out.zero_point)[at] = static_cast<int16_t>(zero[r]);
    }
    write_codes(args, block, begin, end, inverse, s.low, s.high, s.zero);
  }
}

struct SubChoice {
  F32 sub, error;
};

/// The sub-scale of group [begin, end) of y in steps of `step`: the best of the nearest to scale /
/// step and its neighbours.
inline SubChoice choose_sub(const WeightBlock& block, int64_t begin, int64_t end, F32 scale,
                            F32 step) {
  const F32 low = splat(-8.0f), high = splat(7.0f), one = splat(1.0f);
  const F32 nearest = min(to_f32(round(scale * (one / step))), splat(15.0f));
  const F32 candidates[3] = {nearest, max(nearest - one, splat(0.0f)),
                             min(nearest + one, splat(15.0f))};
  F32 t[3], r[3], error[3];
  for (int i = 0; i < 3; ++i) {
    t[i] = step * candidates[i];
    r[i] = inverse_or_zero(t[i]);
    error[i] = splat(0.0f);
  }
  for (int64_t k = begin; k < end; ++k) {
    const F32 y = load(block.y + k * kLanes);
    for (int i = 0; i < 3; ++i) {
      const F32 delta = fnma(t[i], clamp_round(y * r[i], low, high), y);
      const F32 weighted = block.importance == nullptr ? delta : splat(block.importance[k]) * delta;
      error[i] = fma(weighted, delta, error[i]);
    }
  }
  SubChoice best = {candidates[0], error[0]};
  for (int i = 1; i < 3; ++i) {
    const Mask better = error[i] < best.error;
    best = {select(better, candidates[i], best.sub), select(better, error[i], best.error)};
  }
  return best;
}

/// Unsigned scales of all groups of y into block.scales; returns their largest.
inline F32 sub16_scales(const QuantizeArgs& args, const WeightBlock& block) {
  F32 largest = splat(0.0f);
  for (int64_t begin = 0; begin < args.k; begin += kSubGroup) {
    const int64_t end = args.k - begin < kSubGroup ? args.k : begin + kSubGroup;
    const F32 amax = largest_magnitude(block.y, begin, end);
    F32 scale = amax / splat(7.0f);
    if (args.mse) {
      // The search wants its group normalised; y itself is needed again.
      const Mask tiny = amax < splat(0x1p-40f);
      const F32 r = splat(1.0f) / select(tiny, splat(1.0f), amax);
      float lanes[kSubGroup * kLanes];
      for (int64_t k = begin; k < end; ++k)
        store(lanes + (k - begin) * kLanes, load(block.y + k * kLanes) * r);
      WeightBlock normalised = block;
      normalised.y = lanes;
      if (block.importance != nullptr) normalised.importance = block.importance + begin;
      scale = search_scale(normalised, 0, end - begin, table(kSub16Scales), splat(-8.0f),
                           splat(7.0f), amax, scale);
      scale = select(tiny, splat(0.0f), scale);
    }
    store(block.scales + begin / kSubGroup * kLanes, scale);
    largest = max(scale, largest);
  }
  return largest;
}

/// The step of the sub-scales that loses least over the row.
inline F32 best_step(const QuantizeArgs& args, const WeightBlock& block, F32 largest) {
  F32 steps[kStepCount], total[kStepCount];
  for (int i = 0; i < kStepCount; ++i) {
    steps[i] = largest / splat(kSub16Steps[i]);
    total[i] = splat(0.0f);
  }
  for (int64_t begin = 0; begin < args.k; begin += kSubGroup) {
    const int64_t end = args.k - begin < kSubGroup ? args.k : begin + kSubGroup;
    const F32 scale = load(block.scales + begin / kSubGroup * kLanes);
    for (int i = 0; i < kStepCount; ++i)
      total[i] = total[i] + choose_sub(block, begin, end, scale, steps[i]).error;
  }
  F32 step = steps[0], least = total[0];
  for (int i = 1; i < kStepCount; ++i) {
    const Mask better = total[i] < least;
    least = select(better, total[i], least);
    step = select(better, steps[i], step);
  }
  return step;
}

inline void quantize_sub16(const QuantizeArgs& args, const WeightBlock& block) {
  const int64_t groups = (args.k + kSubGroup - 1) / kSubGroup;
  const F32 amax = largest_magnitude(block.x, 0, args.k);
  const Mask tiny = amax < splat(kTinyWeight);
  const F32 safe = select(tiny, splat(1.0f), amax), r = splat(1.0f) / safe;
  for (int64_t k = 0; k < args.k; ++k) store(block.y + k * kLanes, load(block.x + k * kLanes) * r);
  const F32 largest = select(tiny, splat(1.0f), sub16_scales(args, block));
  const F32 step = args.mse ? best_step(args, block, largest) : largest / splat(15.0f);
  const F32 own = select(tiny, splat(0.0f), amax * step);
  float own_scales[kLanes];
  store(own_scales, own);
  for (int64_t r = 0; r < block.rows; ++r)
    static_cast<float*>(args.out.scale)[block.row + r] = own_scales[r];
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * kSubGroup,
                  end = args.k - begin < kSubGroup ? args.k : begin + kSubGroup;
    const F32 scale = load(block.scales + g * kLanes);
    F32 sub = args.mse ? choose_sub(block, begin, end, scale, step).sub
                       : clamp_round(scale * (splat(1.0f) / step), splat(1.0f), splat(15.0f));
    sub = select(tiny, splat(0.0f), sub);
    float subs[kLanes];
    store(subs, sub);
    for (int64_t r = 0; r < block.rows; ++r) {
      args.out.sub_scale[(block.row + r) * groups + g] = static_cast<uint8_t>(subs[r]);
    }
    const F32 inverse = inverse_or_zero(own * sub);
    write_codes(args, block, begin, end, inverse, splat(-8.0f), splat(7.0f), splat(8.0f));
  }
}

inline void quantize_weight(const QuantizeArgs& args, int64_t begin, int64_t end, float* range) {
  for (int64_t i = begin; i < end; ++i) {
    const WeightBlock block = load_block(args, i * kLanes);
    if (args.scale_kind == ScaleKind::sub16) {
      quantize_sub16(args, block);
    } else {
      quantize_groups(args, block, range);
    }
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
