// The `neon_i8mm` row: every kernel over csrc/simd/neon_i8mm.h.
#define SLMOPS_ISA neon_i8mm
#include "../simd/neon_i8mm.h"
// After the SIMD contract that it is written over.
#include "../kernels/kernels.inl"
