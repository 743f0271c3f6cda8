// The two products of attention over blocks of query rows: s = q k^T with keys as lanes, o = p v
// with elements of v as lanes; each sum is one fma chain, over d and over keys.
#pragma once
#include "common.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// Rows of a block; with fewer rows it is more vectors wide.
constexpr int kBlockRows = kFloatSums < kQueryRows ? kFloatSums : int{kQueryRows};
constexpr int vectors_of(int rows) { return kFloatSums / rows < 4 ? kFloatSums / rows : 4; }

/// Calls body(Int<r>{}) with the least power of two r that `count` rows fit in.
template <int kMax = kBlockRows, class Body>
SLMOPS_INLINE void with_rows(int64_t count, const Body& body) {
  if constexpr (kMax > 1) {
    if (count <= kMax / 2) return with_rows<kMax / 2>(count, body);
  }
  body(Int<kMax>{});
}

/// Calls body(i, Int<vectors>{}) for i = begin, ...: blocks of kMax vectors, then of half as many.
template <int kMax, class Body>
SLMOPS_INLINE int64_t for_vectors(int64_t begin, int64_t end, const Body& body) {
  for (; begin + kMax * kLanes <= end; begin += kMax * kLanes) body(begin, Int<kMax>{});
  if constexpr (kMax > 1) return for_vectors<kMax / 2>(begin, end, body);
  return begin;
}

template <int kRows, int kVectors>
SLMOPS_INLINE void store_sums(const F32 (&sum)[kRows][kVectors], float* out, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(out + r * stride + j * kLanes, sum[r][j]);
  }
}

/// How far ahead of its reads attention asks for keys and values, into the second level. It takes
/// so long over each line that the hardware's own prefetching leaves it waiting: 0.6 of the time
/// for one query on 8192 bf16 keys (Zen 4; into the first level it is no gain).
constexpr int64_t kAhead = 16384;

/// The `ahead` of what is in the caches.
constexpr int64_t kCached = -1;

/// Asks for what lies kAhead bytes after data + offset, once for each whole line; where `ahead` is
/// not 0, for what lies that far after it, into the first level (Zen 5, 8 KiB: 0.86 of the time of
/// one query). For nothing where it is kCached.
SLMOPS_INLINE void ask_ahead(const uint8_t* data, int64_t offset, int64_t ahead) {
  if (ahead == kCached || offset % kLineBytes != 0) return;
  if (ahead == 0) return prefetch_l2(data + offset + kAhead);
  prefetch(data + offset + ahead);
}

/// Keys of a split in blocks of 16, d-major: data is the first block's. Key j of them is at
/// position j - shift of the split.
struct Keys {
  const uint8_t* data;
  DType type;
  int64_t shift, ahead;
};

/// scores[row][j - shift], times `scale`, for keys j in [begin, end), multiples of 16. q:
/// [kRows][d].
template <int kRows>
inline void key_products(const float* q, const Keys& keys, int64_t d, int64_t begin, int64_t end,
                         float scale, float* scores) {
  with_type(keys.type, [&](auto constant) {
    constexpr DType kType = decltype(constant)::value;
    for_vectors<vectors_of(kRows)>(begin, end, [&](int64_t i, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      F32 sum[kRows][kVectors];
      clear(sum);
      for (int64_t e = 0; e < d; ++e) {
        F32 x[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          // In the order of memory, in which the hardware's own prefetching follows.
          const int64_t asked = i * d + (e * kVectors + j) * kLanes;
          ask_ahead(keys.data, asked * size_of(kType), keys.ahead);
          x[j] = load_as(kType, keys.data, i * d + (j * d + e) * kLanes);
        }
        add_products(q + e, d, x, sum);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[r][j] = sum[r][j] * splat(scale);
      }
      store_sums(sum, scores + i - keys.shift, kScoreStride);
    });
  });
}

/// The values of a split: position i is row first + i of data, `stride` elements apart.
struct Values {
  const uint8_t* data;
  DType type;
  int64_t stride, first, dv, ahead;

  const uint8_t* at(int64_t i) const { return data + (first + i) * stride * size_of(type); }
};

/// out[row] = sum over positions [begin, end) of p[row][i] v[i]. dv is a multiple of 16, or v is
/// padded to one with zeros.
template <int kRows>
inline void value_products(const float* p, const Values& v, int64_t begin, int64_t end, float* out,
                           int64_t out_stride) {
  with_type(v.type, [&](auto constant) {
    constexpr DType kType = decltype(constant)::value;
    const int64_t width = (v.dv + kLanes - 1) / kLanes * kLanes, step = v.stride * size_of(kType);
    for_vectors<vectors_of(kRows)>(0, width, [&](int64_t e, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      F32 sum[kRows][kVectors];
      clear(sum);
      const uint8_t* value = v.at(begin);
      for (int64_t i = begin; i < end; ++i, value += step) {
        F32 x[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          const int64_t at = e + j * kLanes;
          ask_ahead(value, at * size_of(kType), v.ahead);
          x[j] = load_as(kType, value, at);
        }
        add_products(p + i, kScoreStride, x, sum);
      }
      store_sums(sum, out + e, out_stride);
    });
  });
}

/// The same where a v that is not finite has to be skipped if its p is 0.
inline void careful_value_products(const float* p, int64_t rows, const Values& v, int64_t begin,
                                   int64_t end, float* out, int64_t out_stride) {
  const int64_t width = (v.dv + kLanes - 1) / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r, p += kScoreStride, out += out_stride) {
    for (int64_t e = 0; e < width; e += kLanes) {
      F32 sum = splat(0.0f);
      for (int64_t i = begin; i < end; ++i) {
        if (p[i] != 0.0f) sum = fma(splat(p[i]), load_as(v.type, v.at(i), e), sum);
      }
      store(out + e, sum);
    }
  }
}

inline bool values_are_finite(const Values& v, int64_t begin, int64_t end) {
  I32 most = splat_i32(0);
  const int64_t width = (v.dv + kLanes - 1) / kLanes * kLanes;
  with_type(v.type, [&](auto constant) {
    constexpr DType kType = decltype(constant)::value;
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t e = 0; e < width; e += kLanes) {
        most = max(most, bits_of(abs(load_as(kType, v.at(i), e))));
      }
    }
  });
  return reduce_max(most) < 0x7f800000;
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
