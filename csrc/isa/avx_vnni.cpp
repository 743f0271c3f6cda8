// The `avx_vnni` row: every kernel over csrc/simd/avx_vnni_dots.h.
#define SLMOPS_ISA avx_vnni
#include "../simd/avx_vnni_dots.h"
// After the SIMD contract that it is written over.
#include "../kernels/kernels.inl"
