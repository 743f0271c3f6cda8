// The `avx2` row: every kernel over csrc/simd/avx2.h.
#define SLMOPS_ISA avx2
#include "../simd/avx2.h"
// After the SIMD contract that it is written over.
#include "../kernels/kernels.inl"
