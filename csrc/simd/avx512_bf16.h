// What linear_fast.h asks of an instruction set beyond the SIMD contract: dots of bfloat16 pairs.
// On AVX-512 BF16.
//
// The dot flushes denormals and rounds in an order of its own, so what uses it is outside of the
// promise of bits.
#pragma once
#include "avx512.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// 16 lanes of two bf16.
struct Halves {
  __m512i v;
};
/// A bf16 for each value of a nibble, twice: bit 4 of a place, of the next nibble, is ignored.
struct Table {
  __m512i v;
};
inline Table load_table(const uint16_t* values) { return {_mm512_loadu_si512(values)}; }
/// Nibble `place` of each 16 bits, looked up.
inline Halves look_up(Line x, int place, Table table) {
  const __m512i at = place == 0 ? x.v : _mm512_srli_epi16(x.v, static_cast<unsigned>(4 * place));
  return {_mm512_permutexvar_epi16(at, table.v)};
}
/// The pair x[0], x[1] in all lanes.
inline Halves load_pair(const uint16_t* x) {
  int32_t pair;
  memcpy(&pair, x, sizeof(pair));
  return {_mm512_set1_epi32(pair)};
}
/// acc + w[0] * x[0] + w[1] * x[1] per lane.
inline F32 dot2(F32 acc, Halves w, Halves x) {
  return {
      _mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(w.v), reinterpret_cast<__m512bh>(x.v))};
}
/// Stores 16 bf16, of each eight 0, 2, 4, 6, 1, 3, 5, 7.
inline void store_pairs(uint16_t* p, const uint16_t* x) {
  const __m256i order = _mm256_setr_epi16(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutexvar_epi16(order, load_ymm(x)));
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
