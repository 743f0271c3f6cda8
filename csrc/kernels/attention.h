// out = softmax(q k^T * scale + mask) v: per split of 256 key positions a maximum, a sum and a
// weighted sum of v, merged in ascending order. docs/arithmetic.md, "attention", has every
// rounding.
//
// For q k^T the lanes are 16 keys, from a transposed copy of the split that all queries of an item
// share; for p v they are elements of v. Nothing is summed across lanes but the sum of p.
#pragma once
#include "attention_products.h"

namespace slmops::SLMOPS_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

/// One item: the rows of a block of queries, row = query * group + head, and one key head.
struct Item {
  int64_t b, kv_head, query, queries, group;
  int64_t rows() const { return queries * group; }
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
    keys = take(kSplit * args.d);
    values = take(kSplit * part);
    scores = take(kQueryRows * kSplit);
    parts = take(kQueryRows * part);
    begin = reinterpret_cast<int64_t*>(next);
    end = begin + padded;
  }
  int64_t part, v_stride;
  float* q;        // [rows][d]
  float* states;   // [rows][part]: max, sum, from 16 on the weighted sum of v
  float* keys;     // [16][d][16]: blocks of 16 positions of the split, d-major
  float* values;   // [256][v_stride]
  float* scores;   // [8][256]
  float* parts;    // [8][part]
  int64_t* begin;  // [rows]: positions of the split that a row may see are in [begin, end)
  int64_t* end;
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

/// Raw products to scores: scale, softcap, additive mask, and -inf where a row may not see.
inline void mask_scores(const AttentionArgs& args, const Item& item, int64_t row, int64_t first,
                        Range blocks, const Workspace& w, float* s) {
  const F32 scale = splat(args.scale), cap = splat(args.softcap), low = splat(-kInfinity);
  for (int64_t i = blocks.begin; i < blocks.end; i += kLanes) {
    F32 x = load(s + i) * scale;
    if (args.softcap > 0.0f) x = tanh(x / cap) * cap;
    store(s + i, x);
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

/// Lanes joined by `op`, which may be of any order.
template <class Op>
SLMOPS_INLINE float across(F32 x, const Op& op) {
  float lane[kLanes];
  store(lane, x);
  for (int i = 1; i < kLanes; ++i) lane[0] = op(lane[0], lane[i]);
  return lane[0];
}

/// Scores to p = exp(s - max) in place, max and sum into `part`; returns whether no p is 0.
inline bool softmax(Range blocks, float* s, float* part) {
  const F32 high = splat(kInfinity);
  F32 most = splat(-kInfinity);
  for (int64_t i = blocks.begin; i < blocks.end; i += kLanes) {
    const F32 x = load(s + i);
    most = max(most, select(is_nan(x), high, x));
  }
  const float m = across(most, [](float a, float b) { return a > b ? a : b; });
  part[0] = m;
  if (m == -kInfinity) return true;
  F32 sums = splat(0.0f), least = high;
  for (int64_t i = blocks.begin; i < blocks.end; i += kLanes) {
    const F32 p = exp(load(s + i) - splat(m));
    store(s + i, p);
    sums = sums + p;
    least = min(p, least);
  }
  part[1] = reduce16(sums);
  return across(least, [](float a, float b) { return a < b ? a : b; }) > 0.0f;
}

/// Merges a part of the keys into a state, both [max, sum, .., weighted sum of v].
inline void merge(const float* part, float* state, int64_t floats) {
  if (part[0] == -kInfinity) return;
  if (state[0] == -kInfinity) {
    memcpy(state, part, static_cast<size_t>(floats) * sizeof(float));
    return;
  }
  const float m = state[0] > part[0] ? state[0] : part[0];
  const F32 a = exp(splat(state[0] - m)), b = exp(splat(part[0] - m));
  float sum[kLanes];
  store(sum, fma(splat(state[1]), a, splat(part[1]) * b));
  state[0] = m;
  state[1] = sum[0];
  for (int64_t i = kLanes; i < floats; i += kLanes) {
    store(state + i, fma(load(state + i), a, load(part + i) * b));
  }
}

/// The result of a row whose keys have all been merged; `row` counts [batch][queries][heads].
inline void finish(const AttentionArgs& args, const float* state, int64_t row) {
  const DType type = args.q.type;
  uint8_t* out = static_cast<uint8_t*>(args.out) + row * args.dv * size_of(type);
  const bool empty = state[0] == -kInfinity;
  const F32 r = splat(1.0f) / splat(state[1]), zero = splat(0.0f);
  for_lanes(args.dv, [&](int64_t i, auto lanes) {
    store_lanes(type, out, i, empty ? zero : fma(load(state + kLanes + i), r, zero), lanes);
  });
}

/// The parts of rows [row, row + count), at most kBlockRows, of the split whose position 0 is slot
/// `first`, into w.parts.
inline void split_rows(const AttentionArgs& args, const Item& item, int64_t first, const Values& v,
                       int64_t row, int64_t count, const Workspace& w) {
  const Range seen = join(w, row, count);
  for (int64_t i = 0; i < count; ++i) w.parts[i * w.part] = -kInfinity;
  if (seen.begin >= seen.end) return;
  const Range blocks = whole_blocks(seen);
  with_rows(count, [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    key_products<kRows>(w.q + row * args.d, w.keys, args.d, blocks.begin, blocks.end, w.scores);
    bool positive = true;
    for (int64_t i = 0; i < count; ++i) {
      float* s = w.scores + i * kSplit;
      mask_scores(args, item, row + i, first, blocks, w, s);
      positive &= softmax(blocks, s, w.parts + i * w.part);
    }
    float* out = w.parts + kLanes;
    if (positive || values_are_finite(v, seen.begin, seen.end)) {
      value_products<kRows>(w.scores, v, seen.begin, seen.end, out, w.part);
    } else {
      careful_value_products(w.scores, count, v, seen.begin, seen.end, out, w.part);
    }
  });
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

/// Positions `seen` of the split, 16 by 16 transposed, into w.keys; zeros around them.
inline void load_keys(const HeadRows& k, int64_t first, Range seen, int64_t d, const Workspace& w) {
  const Range blocks = whole_blocks(seen);
  with_type(k.type, [&](auto constant) {
    constexpr DType kType = decltype(constant)::value;
    for (int64_t block = blocks.begin; block < blocks.end; block += kLanes) {
      float* out = w.keys + block * d;
      const Range there = {seen.begin - block, seen.end - block};
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
}

/// Where the products read v: in place where its rows are whole vectors, read once; else from
/// w.values.
inline Values load_values(const AttentionArgs& args, const HeadRows& v, int64_t first, Range seen,
                          int64_t rows, const Workspace& w) {
  if (rows <= kBlockRows && args.dv % kLanes == 0)
    return {v.data, v.type, v.stride, first, args.dv};
  with_type(v.type, [&](auto constant) {
    constexpr DType kType = decltype(constant)::value;
    for (int64_t i = seen.begin; i < seen.end; ++i) {
      for_lanes(args.dv, [&](int64_t e, auto lanes) {
        store(w.values + i * w.v_stride + e, load_lanes(kType, v.at(first + i), e, lanes));
      });
    }
  });
  return {reinterpret_cast<const uint8_t*>(w.values), DType::f32, w.v_stride, 0, args.dv};
}

/// Calls take(row, part) for the rows of an item in the split whose position 0 is slot `first`.
template <class Take>
inline void run_split(const AttentionArgs& args, const Item& item, int64_t first,
                      const Workspace& w, const Take& take) {
  const int64_t rows = item.rows();
  find_ranges(args, item, first, w);
  const Range seen = join(w, 0, rows);
  Values v = {};
  if (seen.begin < seen.end) {
    load_keys(head_rows(args.k, item.b, item.kv_head), first, seen, args.d, w);
    v = load_values(args, head_rows(args.v, item.b, item.kv_head), first, seen, rows, w);
  }
  for (int64_t row = 0; row < rows; row += kBlockRows) {
    const int64_t count = rows - row < kBlockRows ? rows - row : kBlockRows;
    split_rows(args, item, first, v, row, count, w);
    for (int64_t i = 0; i < count; ++i) take(row + i, w.parts + i * w.part);
  }
}

/// The number of a row in [batch][queries][heads].
inline int64_t row_number(const AttentionArgs& args, const Item& item, int64_t row) {
  return (item.b * args.queries + item.query + row / item.group) * args.heads +
         item.kv_head * item.group + row % item.group;
}

inline void attention_item(const AttentionArgs& args, const Item& item, int64_t split,
                           uint8_t* scratch) {
  const Workspace w(args, args.block * item.group, scratch);
  load_queries(args, item, w);
  const int64_t position = args.first_position == nullptr ? 0 : args.first_position[item.b];
  // Slot of position 0 of the sequence's first split: 0 or up to 255 before it.
  const int64_t origin = -(position & (kSplit - 1));
  if (args.splits != 0) {
    run_split(args, item, origin + split * kSplit, w, [&](int64_t row, const float* part) {
      const int64_t at = row_number(args, item, row) * args.splits + split;
      memcpy(args.parts + at * w.part, part, static_cast<size_t>(w.part) * sizeof(float));
    });
    return;
  }
  for (int64_t row = 0; row < item.rows(); ++row) w.states[row * w.part] = -kInfinity;
  for (int64_t first = origin; first < args.keys; first += kSplit) {
    run_split(args, item, first, w, [&](int64_t row, const float* part) {
      merge(part, w.states + row * w.part, w.part);
    });
  }
  for (int64_t row = 0; row < item.rows(); ++row) {
    finish(args, w.states + row * w.part, row_number(args, item, row));
  }
}

inline void attention(const AttentionArgs& args, int64_t begin, int64_t end, uint8_t* scratch) {
  const int64_t splits = args.splits == 0 ? 1 : args.splits;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / splits / args.blocks, at = i / splits % args.blocks;
    // First, last, second, ...: under a causal mask shares of a few items are then alike.
    const int64_t block = at % 2 == 0 ? at / 2 : args.blocks - 1 - at / 2;
    const int64_t query = block * args.block, left = args.queries - query;
    const Item item = {head / args.kv_heads, head % args.kv_heads, query,
                       left < args.block ? left : args.block, args.heads / args.kv_heads};
    attention_item(args, item, i % splits, scratch);
  }
}

inline void attention_merge(const AttentionArgs& args, int64_t begin, int64_t end) {
  const int64_t floats = part_floats(args.dv);
  for (int64_t row = begin; row < end; ++row) {
    float* state = args.parts + row * args.splits * floats;
    for (int64_t split = 1; split < args.splits; ++split) {
      merge(state + split * floats, state, floats);
    }
    finish(args, state, row);
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
