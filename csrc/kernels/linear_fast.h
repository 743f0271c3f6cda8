// linear, activations="float_fast", by dots of bf16 pairs: sums over groups of s * (sum over k of
// bf16(x) * (u - z)).
//
// u - z (or u) is exact in bf16: one lookup of a nibble for int4, of two nibbles for int8. The sums
// are fp32, in the order of the dots; docs/arithmetic.md has the error bound.
#pragma once
#include "linear.h"

namespace slmops::SLMOPS_ISA {
namespace {

struct NibbleValues {
  uint16_t v[32];
};
/// bf16 of factor * (nibble - shift).
constexpr NibbleValues nibble_values(int factor, int shift) {
  NibbleValues values = {};
  for (int i = 0; i < 32; ++i) {
    const float value = static_cast<float>(factor * (i % 16 - shift));
    values.v[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, value) >> 16);
  }
  return values;
}
constexpr NibbleValues kPlain = nibble_values(1, 0), kSigned = nibble_values(1, 8);
constexpr NibbleValues kPlainHigh = nibble_values(16, 0), kSignedHigh = nibble_values(16, 8);

/// The values of a code's low and high nibble (int4: of either); without zero points u - z.
struct Tables {
  Table low, high;
};
SLMOPS_INLINE Tables tables_of(const Format& f) {
  const bool is_signed = f.zero_kind == ZeroKind::none;
  if (f.bits == 4) {
    const Table table = load_table(is_signed ? kSigned.v : kPlain.v);
    return {table, table};
  }
  return {load_table(kPlain.v), load_table(is_signed ? kSignedHigh.v : kPlainHigh.v)};
}

/// Sums of a row that are kept apart until a group ends, so that dots need not wait for another.
template <int kRows>
constexpr int kChains = kRows == 1 ? 4 : 2;

/// t += the products of 8 k with 16 outputs of each line.
template <int kBits, int kRows, int kLines, int kSums>
SLMOPS_INLINE void add_eight(const uint8_t* lines, const Tables& tables, const uint16_t* x,
                             int64_t stride, F32 (&t)[kSums][kRows][kLines]) {
  constexpr int kParts = kBits == 4 ? 1 : 2;
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part, lines += 2 * kLineBytes) {
    Line line[kLines];
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) line[l] = load_line(lines + l * kLineBytes);
#pragma GCC unroll 4
    for (int place = 0; place < 4; ++place) {
      Halves w[kLines];
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        w[l] = look_up(line[l], place, place % 2 == 0 ? tables.low : tables.high);
      }
      const int pair = kBits == 4 ? place : place / 2 * 2 + part;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Halves a = load_pair(x + r * stride + 2 * pair);
#pragma GCC unroll 2
        for (int l = 0; l < kLines; ++l) {
          F32& sum = t[place % kSums][r][l];
          sum = dot2(sum, w[l], a);
        }
      }
    }
  }
}

template <int kSums, int kRows, int kLines>
SLMOPS_INLINE void clear(F32 (&t)[kSums][kRows][kLines]) {
#pragma GCC unroll 4
  for (auto& sums : t) clear(sums);
}

template <int kSums, int kRows, int kLines>
SLMOPS_INLINE F32 total(const F32 (&t)[kSums][kRows][kLines], int r, int l) {
  F32 sum = t[0][r][l];
#pragma GCC unroll 3
  for (int i = 1; i < kSums; ++i) sum = sum + t[i][r][l];
  return sum;
}

/// x: pairs of the pass's first row at the chunk's first k; sums: of x in its groups.
template <int kBits, bool kZeros, class A, int kRows, int kLines>
SLMOPS_INLINE void fast_group_pass(const Format& f, const Chunk& chunk, int half,
                                   const Tables& tables, const uint16_t* x, const float* sums,
                                   int64_t sum_stride, A ask, F32 (&acc)[kRows][kLines]) {
  constexpr int64_t kEight = kBits == 4 ? 2 * kLineBytes : 4 * kLineBytes;
  const int64_t scale_offset = f.group / 8 * kEight + half * 32;
  const uint8_t* group = chunk.lines;
  for (int64_t k = 0; k < chunk.count; group += f.group_bytes, ++sums) {
    F32 t[kChains<kRows>][kRows][kLines];
    clear(t);
    const uint8_t* lines = group + half * kLineBytes;
    for (const int64_t end = k + f.group; k < end; k += 16, lines += 2 * kEight) {
      ask.more();
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        add_eight<kBits>(lines + i * kEight, tables, x + k + 8 * i, f.k_padded, t);
      }
    }
#pragma GCC unroll 2
    for (int l = 0; l < kLines; ++l) {
      const uint8_t* scales = group + scale_offset + l * 32;
      const F32 s = load_scale(f.scale_type, scales);
      F32 shift = splat(0.0f);
      if constexpr (kZeros) {
        const uint8_t* zeros = scales + kLineBytes;
        const F32 z = f.zero_kind == ZeroKind::int16 ? to_f32(load_i16(zeros))
                                                     : load_scale(f.scale_type, zeros);
        shift = f.zero_kind == ZeroKind::offset ? z : negate(s * z);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        acc[r][l] = fma(total(t, r, l), s, acc[r][l]);
        if constexpr (kZeros) acc[r][l] = fma(splat(sums[r * sum_stride]), shift, acc[r][l]);
      }
    }
  }
}

template <class A, int kRows, int kLines>
SLMOPS_INLINE void fast_sub16_pass(const Format& f, const Chunk& chunk, int half,
                                   const Tables& tables, const uint16_t* x, A ask,
                                   F32 (&acc)[kRows][kLines]) {
  const uint8_t* block = chunk.lines;
  for (int64_t k = 0; k < chunk.count; block += kSubBlockBytes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, k += kSubGroup) {
      ask.more();
      F32 t[kChains<kRows>][kRows][kLines];
      clear(t);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        add_eight<4>(block + (4 * j + 2 * i + half) * kLineBytes, tables, x + k + 8 * i, f.k_padded,
                     t);
      }
#pragma GCC unroll 2
      for (int l = 0; l < kLines; ++l) {
        const F32 sub = to_f32(sub_scales(block + 16 * kLineBytes + (half + l) * 32, j));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r][l] = fma(total(t, r, l), sub, acc[r][l]);
      }
    }
  }
}

inline void fast_step(const Step& s) {
  const Format& f = *s.args.format;
  const Tables tables = tables_of(f);
  const int64_t groups = f.k_padded / f.group;
  const int64_t calls = s.chunk.count / 16;
  for_asking_passes(s, s.begin, s.end, calls, [&](auto& acc, int half, int64_t row, auto ask) {
    const uint16_t* x = s.args.pairs.x + row * f.k_padded + s.k;
    if (f.scale_kind == ScaleKind::sub16) {
      return fast_sub16_pass(f, s.chunk, half, tables, x, ask, acc);
    }
    const float* sums = s.args.pairs.sums + row * groups + s.k / f.group;
    const auto pass = [&](auto bits) {
      constexpr int kBits = decltype(bits)::value;
      if (f.zero_kind == ZeroKind::none) {
        fast_group_pass<kBits, false>(f, s.chunk, half, tables, x, sums, groups, ask, acc);
      } else {
        fast_group_pass<kBits, true>(f, s.chunk, half, tables, x, sums, groups, ask, acc);
      }
    };
    if (f.bits == 4) return pass(Int<4>{});
    pass(Int<8>{});
  });
}

/// FastKernels::linear.
inline void linear_fast(const LinearArgs& args, int64_t tile, int64_t begin, int64_t end) {
  const int64_t length = step_length(*args.format, end - begin);
  walk_tile(args, tile, begin, end, length, [&](Step& s) { for_chunks(s, length, fast_step); });
}

/// Rows as pairs, and the sums of their groups where zero points or offsets want them.
inline void round_rows(const Format& f, const SourceRows& src, const PairRows& out, int64_t begin,
                       int64_t end) {
  const bool sums = f.zero_kind != ZeroKind::none;
  for (int64_t i = begin; i < end; ++i) {
    uint16_t* pairs = out.x + i * f.k_padded;
    float* sum = out.sums + i * (f.k_padded / f.group);
    with_row(src, i, f.k, f.k_padded, [&](const auto& row) {
      for (int64_t k = 0; k < f.k_padded; ++sum) {
        F32 partials = splat(0.0f);
        for (const int64_t group_end = k + f.group; k < group_end; k += kLanes) {
          alignas(64) uint16_t rounded[kLanes];
          store_bf16(rounded, row(k));
          store_pairs(pairs + k, rounded);
          if (sums) partials = partials + load_bf16(rounded);
        }
        if (sums) *sum = reduce_add(partials);
      }
    });
  }
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
