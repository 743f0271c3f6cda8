// The `avx_vnni` row with its two instructions made of those of AVX2: the same kernels on a CPU
// that has no AVX-VNNI.
#include <immintrin.h>

namespace {

/// acc + the sum of 4 products of u8 and s8, in int32 that wraps. As 16-bit numbers, 2 products at
/// a time: nothing saturates.
inline __m256i emulated_dpbusd(__m256i acc, __m256i u, __m256i s) {
  const __m256i even_u = _mm256_and_si256(u, _mm256_set1_epi16(255));
  const __m256i odd_u = _mm256_srli_epi16(u, 8);
  const __m256i even_s = _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8);
  const __m256i odd_s = _mm256_srai_epi16(s, 8);
  const __m256i even = _mm256_madd_epi16(even_u, even_s), odd = _mm256_madd_epi16(odd_u, odd_s);
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
/// acc + the sum of 2 products of int16.
inline __m256i emulated_dpwssd(__m256i acc, __m256i a, __m256i b) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}

}  // namespace

#define _mm256_dpbusd_avx_epi32 emulated_dpbusd
#define _mm256_dpwssd_avx_epi32 emulated_dpwssd
#define SLMOPS_ISA avx_vnni_emulated
#include "../../../csrc/simd/avx_vnni_dots.h"
// After the SIMD contract that it is written over.
#include "../../../csrc/kernels/kernels.inl"
