// The `avx512_vnni` row: every kernel over csrc/simd/avx512.h.
#define SLMOPS_ISA avx512_vnni
#include "../simd/avx512.h"
// After the SIMD contract that it is written over.
#include "../kernels/kernels.inl"
