// The `avx2` row: every kernel over csrc/simd/avx2_dots.h.
#define SLMOPS_ISA avx2
#include "../simd/avx2_dots.h"
// After the SIMD contract that it is written over.
#include "../kernels/kernels.inl"
