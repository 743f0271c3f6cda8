// out = softmax(q k^T * scale + mask) v: per split of 256 key positions a maximum, a sum and a
// weighted sum of v, merged in ascending order. docs/arithmetic.md, "attention", has every
// rounding.
//
// For q k^T the lanes are 16 keys, from blocks of keys, or from a transposed copy of the split that
// all queries of an item share; for p v they are elements of v. Nothing is summed across lanes but
// the sum of p.
#pragma once
#include "attention_int8.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// Merges a part of the keys into a state, both [max, sum, .., weighted sum of v].
inline void merge(const float* part, float* state, int64_t floats) {
  if (part[0] == -kInfinity) return;
  if (state[0] == -kInfinity) {
    memcpy(state, part, static_cast<size_t>(floats) * sizeof(float));
    return;
  }
  // Of exp(state's maximum - m) and exp(part's - m) one is exp(0), which is 1.
  const bool more = part[0] > state[0];
  const F32 one = splat(1.0f), e = exp(splat(more ? state[0] - part[0] : part[0] - state[0]));
  const F32 a = more ? e : one, b = more ? one : e;
  if (more) state[0] = part[0];
  float sum[kLanes];
  store(sum, fma(splat(state[1]), a, splat(part[1]) * b));
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
inline void split_rows(const AttentionArgs& args, const Item& item, int64_t first, const Keys& k,
                       const Values& v, int64_t row, int64_t count, const Workspace& w) {
  const Range seen = join(w, row, count);
  for (int64_t i = 0; i < count; ++i) w.parts[i * w.part] = -kInfinity;
  if (seen.begin >= seen.end) return;
  const Range blocks = whole_blocks(seen);
  with_rows(count, [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    const Range keys = whole_blocks({seen.begin + k.shift, seen.end + k.shift});
    key_products<kRows>(w.q + row * args.d, k, args.d, keys.begin, keys.end, args.scale, w.scores);
    bool positive = true;
    for (int64_t i = 0; i < count; ++i) {
      mask_scores(args, item, row + i, first, blocks, w, w.scores + i * kScoreStride);
    }
    for_softmax_rows(count, [&](auto together, int64_t i) {
      constexpr int kTogether = decltype(together)::value;
      positive &=
          softmax<kTogether>(blocks, w.scores + i * kScoreStride, w.parts + i * w.part, w.part);
    });
    float* out = w.parts + kLanes;
    if (positive || values_are_finite(v, seen.begin, seen.end)) {
      value_products<kRows>(w.scores, v, seen.begin, seen.end, out, w.part);
    } else {
      careful_value_products(w.scores, count, v, seen.begin, seen.end, out, w.part);
    }
  });
}

/// Calls take(row, part) for the rows of an item in the split whose position 0 is slot `first`.
template <class Take>
inline void run_split(const AttentionArgs& args, const Item& item, int64_t first,
                      const Workspace& w, const Take& take) {
  const int64_t rows = item.rows();
  find_ranges(args, item, first, w);
  const Range seen = join(w, 0, rows);
  Keys k = {};
  Values v = {};
  Int8Split both = {};
  if (seen.begin < seen.end && args.is_int8) {
    both = find_int8(args, item, first, seen, w);
  } else if (seen.begin < seen.end) {
    const HeadRows keys = head_rows(args.k, item.b, item.kv_head);
    k = args.k_blocked ? find_blocked_keys(args, keys, first, seen, rows, w)
                       : load_keys(keys, first, seen, args.d, w);
    v = load_values(args, head_rows(args.v, item.b, item.kv_head), first, seen, rows, w);
  }
  for (int64_t row = 0; row < rows; row += kBlockRows) {
    const int64_t count = rows - row < kBlockRows ? rows - row : kBlockRows;
    if (args.is_int8) {
      int8_split_rows(args, item, first, both, row, count, w);
    } else {
      split_rows(args, item, first, k, v, row, count, w);
    }
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
  if (args.is_int8) {
    round_queries(args, item, w);
  } else {
    load_queries(args, item, w);
  }
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
