// What attention computes on: which keys a row may see, its queries in fp32, and a split's keys and
// values in a thread's scratch.
#pragma once
#include "attention_products.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// One item: the rows of a block of queries, row = query * group + head, and one key head.
struct Item {
  int64_t b, kv_head, query, queries, group;
  int64_t rows() const { return queries * group; }
};

/// The pieces of a thread's scratch that int8 keys and values take.
struct Int8Workspace {
  Int8Workspace() = default;
  Int8Workspace(int64_t rows, float* next)
      : factor(next),
        k_scale(factor + rows + kKeyBlock),
        v_scale(k_scale + kScoreStride),
        value_factor(v_scale + kScoreStride - kKeyBlock),
        preset(reinterpret_cast<int32_t*>(value_factor + kQueryRows)),
        high_preset(preset + rows),
        low_preset(high_preset + kQueryRows),
        q(reinterpret_cast<int8_t*>(low_preset + kQueryRows)),
        high(q + rows * kCodeStride + kKeyBlock),
        low(high + kQueryRows * kScoreStride) {}
  float* factor = nullptr;  // [rows]: scale of a query's codes times that of the scores
  float* k_scale;           // [kScoreStride], at position 0, as `scores`
  float* v_scale;           // likewise
  float* value_factor;      // [8]: what a row's integer sums of v are multiplied by
  int32_t* preset;          // [rows]: what the dots with a query start from
  int32_t* high_preset;     // [8]: likewise with p
  int32_t* low_preset;
  int8_t* q;     // [rows][kCodeStride]
  int8_t* high;  // [8][kScoreStride]: codes of p / 128, by slots from a block's beginning
  int8_t* low;   // the rest of them
};

/// The pieces of a thread's scratch.
struct Workspace {
  Workspace(const AttentionArgs& args, int64_t rows, uint8_t* scratch)
      : part(part_floats(args.dv)), v_stride(part - kLanes) {
    const int64_t padded = (rows + kQueryRows - 1) / kQueryRows * kQueryRows;
    float* next = reinterpret_cast<float*>(scratch);
    const auto take = [&](int64_t floats) {
      float* piece = next;
      next += floats;
      return piece;
    };
    q = take(padded * args.d);
    states = take(padded * part);
    keys = take((kSplit + kKeyBlock) * args.d);
    values = take(kSplit * part);
    scores = take(kQueryRows * kScoreStride) + kKeyBlock;
    parts = take(kQueryRows * part);
    begin = reinterpret_cast<int64_t*>(next);
    end = begin + padded;
    if (args.is_int8) int8 = Int8Workspace(padded, reinterpret_cast<float*>(end + padded));
  }
  int64_t part, v_stride;
  float* q;        // [rows][d]
  float* states;   // [rows][part]: max, sum, from 16 on the weighted sum of v
  float* keys;     // [17][d][16]: blocks of 16 keys, d-major
  float* values;   // [256][v_stride]
  float* scores;   // [8][kScoreStride], at position 0 of the first row
  float* parts;    // [8][part]
  int64_t* begin;  // [rows]: positions of the split that a row may see are in [begin, end)
  int64_t* end;
  Int8Workspace int8;
};

/// Rows of a tensor's head, `slot` 0 at data.
struct HeadRows {
  const uint8_t* data;
  DType type;
  int64_t stride;  // in elements

  const void* at(int64_t slot) const { return data + slot * stride * size_of(type); }
};

inline HeadRows head_rows(const HeadView& view, int64_t b, int64_t head) {
  const int64_t at = b * view.batch_stride + head * view.head_stride;
  return {static_cast<const uint8_t*>(view.data) + at * size_of(view.type), view.type,
          view.length_stride};
}

/// The mask of a row, from slot 0 on.
inline const uint8_t* mask_row(const AttentionArgs& args, const Item& item, int64_t row) {
  const int64_t head = item.kv_head * item.group + row % item.group;
  const int64_t at = item.b * args.mask_batch_stride + head * args.mask_head_stride +
                     (item.query + row / item.group) * args.mask_query_stride;
  return static_cast<const uint8_t*>(args.mask) +
         at * (args.mask_is_bool ? 1 : size_of(args.mask_type));
}

/// Which positions of the split whose position 0 is slot `first` each row may see, at most: what
/// its mask hides at both ends is cut off.
inline void find_ranges(const AttentionArgs& args, const Item& item, int64_t first,
                        const Workspace& w) {
  for (int64_t row = 0; row < item.rows(); ++row) {
    const int64_t slot = args.keys - args.queries + item.query + row / item.group;
    int64_t begin = first > 0 ? first : 0;
    int64_t end = first + kSplit < args.keys ? first + kSplit : args.keys;
    if (args.causal && slot + 1 < end) end = slot + 1;
    if (args.window > 0 && slot - args.window >= begin) begin = slot - args.window + 1;
    if (args.mask != nullptr && args.mask_is_bool) {
      const uint8_t* seen = mask_row(args, item, row);
      while (begin < end && seen[begin] == 0) ++begin;
      while (begin < end && seen[end - 1] == 0) --end;
    }
    if (begin >= end) begin = end = first;
    w.begin[row] = begin - first;
    w.end[row] = end - first;
  }
}

/// The union of the ranges of `count` rows from `row` on; empty ranges do not count.
struct Range {
  int64_t begin, end;
};
inline Range join(const Workspace& w, int64_t row, int64_t count) {
  Range all = {kSplit, 0};
  for (int64_t i = row; i < row + count; ++i) {
    if (w.begin[i] >= w.end[i]) continue;
    if (w.begin[i] < all.begin) all.begin = w.begin[i];
    if (w.end[i] > all.end) all.end = w.end[i];
  }
  return all;
}

/// As whole blocks of 16 positions.
inline Range whole_blocks(Range r) {
  return {r.begin / kLanes * kLanes, (r.end + kLanes - 1) / kLanes * kLanes};
}

/// w.q = the item's queries as fp32, with rows of zeros up to whole blocks.
inline void load_queries(const AttentionArgs& args, const Item& item, const Workspace& w) {
  const int64_t rows = item.rows(), d = args.d;
  for (int64_t row = 0; row < rows; ++row) {
    const HeadRows q = head_rows(args.q, item.b, item.kv_head * item.group + row % item.group);
    convert(q.at(item.query + row / item.group), q.type, w.q + row * d, DType::f32, d);
  }
  const int64_t padded = (rows + kQueryRows - 1) / kQueryRows * kQueryRows;
  memset(w.q + rows * d, 0, static_cast<size_t>((padded - rows) * d) * sizeof(float));
}

/// Elements [e, e + 16) of 16 keys, transposed, to rows e.. of a block.
template <DType kType, class Lanes>
SLMOPS_INLINE void load_square(const HeadRows& k, int64_t slot, Range seen, int64_t e, Lanes lanes,
                               int64_t count, float* out) {
  F32 x[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const bool there = i >= seen.begin && i < seen.end;
    x[i] = there ? load_lanes(kType, k.at(slot + i), e, lanes) : splat(0.0f);
  }
  transpose(x);
  for (int64_t i = 0; i < count; ++i) store(out + i * kLanes, x[i]);
}

/// Elements [e, e + 32) of 16 bf16 keys, which travel in pairs: half the work of two squares.
SLMOPS_INLINE void load_bf16_pairs(const HeadRows& k, int64_t slot, int64_t e, float* out) {
  F32 x[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const uint8_t* key = static_cast<const uint8_t*>(k.at(slot + i));
    x[i] = load(reinterpret_cast<const float*>(key + e * size_of(DType::bf16)));
  }
  transpose(x);
  const I32 high = splat_i32(static_cast<int32_t>(0xffff0000u));
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    store(out + 2 * i * kLanes, from_bits(shift_left<16>(bits_of(x[i]))));
    store(out + (2 * i + 1) * kLanes, from_bits(bits_of(x[i]) & high));
  }
}

/// As `load_keys`, of keys that lie in blocks already: in place where they are read once, else as
/// fp32 in w.keys.
inline Keys find_blocked_keys(const AttentionArgs& args, const HeadRows& k, int64_t first,
                              Range seen, int64_t rows, const Workspace& w) {
  const int64_t slot = first + seen.begin;  // not negative: there are keys in `seen`
  const int64_t from = slot / kKeyBlock * kKeyBlock, d = args.d;
  const uint8_t* data = k.data + from * d * size_of(k.type);
  const int64_t shift = first - from;
  if (rows <= kBlockRows) return {data, k.type, shift, args.read_ahead};
  const int64_t to = (first + seen.end + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  convert(data, k.type, w.keys, DType::f32, (to - from) * d);
  return {reinterpret_cast<const uint8_t*>(w.keys), DType::f32, shift, kCached};
}

/// Positions `seen` of the split, 16 by 16 transposed, into w.keys; zeros around them.
inline Keys load_keys(const HeadRows& k, int64_t first, Range seen, int64_t d, const Workspace& w) {
  const Range blocks = whole_blocks(seen);
  with_type(k.type, [&](auto constant) {
    constexpr DType kType = decltype(constant)::value;
    for (int64_t block = blocks.begin; block < blocks.end; block += kLanes) {
      float* out = w.keys + block * d;
      const Range there = {seen.begin - block, seen.end - block};
      for (int64_t i = 0; i < kLanes; ++i) {
        const uint8_t* key = static_cast<const uint8_t*>(k.at(first + block + i));
        for (int64_t at = 0; at < d * size_of(kType); at += kLineBytes) ask_ahead(key, at, 0);
      }
      int64_t e = 0;
      if (kType == DType::bf16 && there.begin <= 0 && there.end >= kLanes) {
        for (; e + 2 * kLanes <= d; e += 2 * kLanes) {
          load_bf16_pairs(k, first + block, e, out + e * kLanes);
        }
      }
      for (; e + kLanes <= d; e += kLanes) {
        load_square<kType>(k, first + block, there, e, Whole{}, kLanes, out + e * kLanes);
      }
      if (e < d) {
        load_square<kType>(k, first + block, there, e, Part{d - e}, d - e, out + e * kLanes);
      }
    }
  });
  return {reinterpret_cast<const uint8_t*>(w.keys), DType::f32, 0, kCached};
}

/// Where the products read v: in place where its rows are whole vectors, read once; else from
/// w.values.
inline Values load_values(const AttentionArgs& args, const HeadRows& v, int64_t first, Range seen,
                          int64_t rows, const Workspace& w) {
  const bool in_place = rows <= kBlockRows && args.dv % kLanes == 0;
  if (in_place) return {v.data, v.type, v.stride, first, args.dv, args.read_ahead};
  with_type(v.type, [&](auto constant) {
    constexpr DType kType = decltype(constant)::value;
    for (int64_t i = seen.begin; i < seen.end; ++i) {
      for_lanes(args.dv, [&](int64_t e, auto lanes) {
        store(w.values + i * w.v_stride + e, load_lanes(kType, v.at(first + i), e, lanes));
      });
    }
  });
  return {reinterpret_cast<const uint8_t*>(w.values), DType::f32, w.v_stride, 0, args.dv, kCached};
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
