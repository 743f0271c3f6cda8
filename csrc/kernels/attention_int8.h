// Attention on int8 keys and values. Both products are exact integer dots: q k^T of the codes, and
// p v of the codes of v with p times the scale of v, rounded to 14 bits per row and split.
//
// The codes of p are two of 7 bits, as the dots of the contract multiply bytes: first the high ones
// are summed, then, 128 times that, the low ones on top.
#pragma once
#include "attention_softmax.h"
#include "int8_heads.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr float kTopWeight = 16383.0f;           // of the codes of p
constexpr int32_t kTinyWeightBits = 0x0d800000;  // 2^-100: below it all of a row's are 0

/// w.int8.q = the codes of the item's queries.
inline void round_queries(const AttentionArgs& args, const Item& item, const Workspace& w) {
  for (int64_t row = 0; row < item.rows(); ++row) {
    const HeadRows q = head_rows(args.q, item.b, item.kv_head * item.group + row % item.group);
    const RoundedHead head = round_head(q.at(item.query + row / item.group), q.type, args.d,
                                        w.int8.q + row * kCodeStride);
    w.int8.factor[row] = head.scale * args.scale;
    w.int8.preset[row] = (kDot8Bias - 128) * head.sum;
  }
}

/// A split of keys and values: from the block of 16 slots on that its first seen slot is in.
struct Int8Split {
  const uint8_t* keys;
  const uint8_t* values;
  int64_t shift;  // slot j of the blocks is at position j - shift of the split
  int64_t width;  // padded_head(d)
  int64_t ahead;  // as of Keys
};

/// That of positions `seen`, whose scales go to w.
inline Int8Split find_int8(const AttentionArgs& args, const Item& item, int64_t first, Range seen,
                           const Workspace& w) {
  const int64_t slot = first + seen.begin;  // not negative: there are keys in `seen`
  const int64_t from = slot / kKeyBlock * kKeyBlock, width = padded_head(args.d);
  const auto place = [&](const Int8View& x, float* scale) {
    const int64_t row = item.b * x.scale_batch_stride + item.kv_head * x.scale_head_stride;
    memcpy(scale + seen.begin, x.scale + row + slot,
           static_cast<size_t>(seen.end - seen.begin) * sizeof(float));
    return x.codes + item.b * x.batch_stride + item.kv_head * x.head_stride + from * width;
  };
  return {place(args.k_int8, w.int8.k_scale), place(args.v_int8, w.int8.v_scale), first - from,
          width, item.rows() <= kBlockRows ? args.read_ahead : kCached};
}

/// What a product asks for ahead of its reads: of each quad of codes and vector a line, `step` and
/// `next` bytes apart. It is their order in memory, in which the hardware's own prefetching
/// follows.
struct Asked {
  const uint8_t* data;
  int64_t step, next, ahead;
};

/// sum[r][j] += the dots of 16 * count codes of row r with lines: `step` bytes to the next 4 codes,
/// `next` bytes to those of the next vector. kAsk: they are read for the first time.
template <bool kAsk, int kRows, int kVectors>
SLMOPS_INLINE void add_dots(const int8_t* codes, int64_t stride, const uint8_t* lines, int64_t step,
                            int64_t next, int64_t count, Asked asked, I32 (&sum)[kRows][kVectors]) {
  for (int64_t i = 0; i < count; ++i, codes += kLanes) {
    Codes a[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) a[r] = load_codes(codes + r * stride);
#pragma GCC unroll 4
    for (int quad = 0; quad < 4; ++quad, lines += step) {
      Bytes x[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        if constexpr (kAsk) ask_ahead(asked.data, j * asked.next, asked.ahead);
        x[j] = bytes(load_line(lines + j * next));
      }
      if constexpr (kAsk) asked.data += asked.step;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[r][j] = dot8(sum[r][j], x[j], a[r], quad);
      }
    }
  }
}

/// scores[row][j - shift] = dots of q and k times the scale of k and the factor of q, for slots j
/// in [begin, end), whole blocks.
template <int kRows>
inline void int8_key_products(const Int8Split& both, int64_t row, int64_t begin, int64_t end,
                              const Workspace& w) {
  const int8_t* q = w.int8.q + row * kCodeStride;
  const int32_t* preset = w.int8.preset + row;
  const float* factor = w.int8.factor + row;
  const int64_t width = both.width;
  for_vectors<vectors_of(kRows)>(begin, end, [&](int64_t i, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    I32 sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[r][j] = splat_i32(preset[r]);
    }
    const uint8_t* lines = both.keys + i * width;
    add_dots<true>(q, kCodeStride, lines, 4 * kKeyBlock, kKeyBlock * width, width / kLanes,
                   Asked{lines, kVectors * kLineBytes, kLineBytes, both.ahead}, sum);
    const int64_t position = i - both.shift;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const F32 scale = load(w.int8.k_scale + position + j * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        store(w.scores + r * kScoreStride + position + j * kLanes,
              to_f32(sum[r][j]) * scale * splat(factor[r]));
      }
    }
  });
}

/// Scores to p = exp(s - max), max and sum into `part`, and p times the scale of v in place.
/// most[r]: the bits of the largest of these, those of a NaN where a score is +inf or NaN.
template <int kRows>
SLMOPS_INLINE void int8_softmax(Range blocks, const float* v_scale, float* s, float* part,
                                int64_t part_stride, int32_t (&most)[kRows]) {
  float m[kRows];
  if (!largest_scores(blocks, s, m)) {
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kRows > 1) {
        int32_t own[1];
        int8_softmax(blocks, v_scale, s + r * kScoreStride, part + r * part_stride, part_stride,
                     own);
        most[r] = own[0];
      } else {
        part[0] = m[r];
        part[1] = kNan;
        most[r] = m[r] < 0.0f ? 0 : kInfinityBits;
      }
    }
    return;
  }
  const F32 zero = splat(0.0f);
  F32 sums[kRows];
  I32 largest[kRows];
  for (int r = 0; r < kRows; ++r) {
    sums[r] = zero;
    largest[r] = splat_i32(0);
  }
  for (int64_t i = blocks.begin; i < blocks.end; i += kLanes) {
    const F32 scale = load(v_scale + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      float* at = s + r * kScoreStride + i;
      const F32 p = exp_below(load(at) - splat(m[r]));
      sums[r] = sums[r] + p;
      const F32 weight = select(zero < p, p * scale, zero);
      store(at, weight);
      largest[r] = max(largest[r], bits_of(weight) & splat_i32(0x7fffffff));
    }
  }
  for (int r = 0; r < kRows; ++r) {
    part[r * part_stride] = m[r];
    part[r * part_stride + 1] = reduce_add(sums[r]);
    most[r] = reduce_max(largest[r]);
  }
}

/// The codes of rows of weights in 0 .. those of most_bits[r], from `row` on, at slots: position
/// plus shift.
template <int kRows>
SLMOPS_INLINE void round_weights(Range blocks, Range slots, int64_t shift,
                                 const int32_t (&most_bits)[kRows], float* weights, int64_t row,
                                 const Int8Workspace& w) {
  int8_t* high = w.high + row * kScoreStride;
  int8_t* low = w.low + row * kScoreStride;
  float factor[kRows];
  I32 high_sum[kRows], low_sum[kRows];
  for (int r = 0; r < kRows; ++r) {
    // What of the blocks of slots is in no block of positions is at their ends.
    const auto clear_ends = [&](int8_t* codes) {
      memset(codes + slots.begin, 0, kLanes);
      memset(codes + slots.end - kLanes, 0, kLanes);
    };
    clear_ends(high + r * kScoreStride);
    clear_ends(low + r * kScoreStride);
    const bool nan = most_bits[r] >= kInfinityBits, zero = nan || most_bits[r] < kTinyWeightBits;
    float most;
    memcpy(&most, &most_bits[r], sizeof(most));
    w.value_factor[row + r] = nan ? kNan : zero ? 0.0f : most / kTopWeight;
    factor[r] = zero ? 0.0f : kTopWeight / most;
    // They may be anything where the row's scores are infinite.
    for (int64_t i = blocks.begin; zero && i < blocks.end; i += kLanes) {
      store(weights + r * kScoreStride + i, splat(0.0f));
    }
    high_sum[r] = low_sum[r] = splat_i32(0);
  }
  for (int64_t i = blocks.begin; i < blocks.end; i += kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const I32 code = round(load(weights + r * kScoreStride + i) * splat(factor[r]));
      const I32 top = shift_right<7>(code), rest = code & splat_i32(127);
      store_i8(high + r * kScoreStride + i + shift, top);
      store_i8(low + r * kScoreStride + i + shift, rest);
      high_sum[r] = high_sum[r] + top;
      low_sum[r] = low_sum[r] + rest;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    w.high_preset[row + r] = (kDot8Bias - 128) * reduce_add(high_sum[r]);
    w.low_preset[row + r] = (kDot8Bias - 128) * reduce_add(low_sum[r]);
  }
}

/// w.parts[row] = sum of the codes of p and v over slots [begin, end), whole blocks, times the
/// row's factor.
template <int kRows>
inline void int8_value_products(const Int8Split& both, int64_t begin, int64_t end,
                                const Workspace& w) {
  const int64_t width = both.width, step = 4 * width, count = (end - begin) / kLanes;
  for_vectors<vectors_of(kRows)>(0, width, [&](int64_t e, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    const uint8_t* lines = both.values + begin * width + e * 4;
    I32 sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[r][j] = splat_i32(w.int8.high_preset[r]);
    }
    add_dots<true>(w.int8.high + begin, kScoreStride, lines, step, 4 * kLanes, count,
                   Asked{lines, step, kLineBytes, both.ahead}, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const I32 preset = splat_i32(w.int8.low_preset[r]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[r][j] = shift_left<7>(sum[r][j]) + preset;
    }
    add_dots<false>(w.int8.low + begin, kScoreStride, lines, step, 4 * kLanes, count, Asked{}, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32 factor = splat(w.int8.value_factor[r]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        store(w.parts + r * w.part + kLanes + e + j * kLanes, to_f32(sum[r][j]) * factor);
      }
    }
  });
}

/// As split_rows, of int8.
inline void int8_split_rows(const AttentionArgs& args, const Item& item, int64_t first,
                            const Int8Split& both, int64_t row, int64_t count, const Workspace& w) {
  const Range seen = join(w, row, count);
  for (int64_t i = 0; i < count; ++i) w.parts[i * w.part] = -kInfinity;
  if (seen.begin >= seen.end) return;
  const Range blocks = whole_blocks(seen);
  const Range slots = whole_blocks({seen.begin + both.shift, seen.end + both.shift});
  with_rows(count, [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    int8_key_products<kRows>(both, row, slots.begin, slots.end, w);
    for (int64_t i = 0; i < count; ++i) {
      mask_scores(args, item, row + i, first, blocks, w, w.scores + i * kScoreStride);
    }
    for_softmax_rows(count, [&](auto together, int64_t i) {
      float* s = w.scores + i * kScoreStride;
      int32_t most[decltype(together)::value];
      int8_softmax(blocks, w.int8.v_scale, s, w.parts + i * w.part, w.part, most);
      round_weights(blocks, slots, both.shift, most, s, i, w.int8);
    });
    int8_value_products<kRows>(both, slots.begin, slots.end, w);
  });
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
