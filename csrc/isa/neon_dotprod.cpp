// The `neon_dotprod` row: every kernel over csrc/simd/neon_dotprod.h.
#define SLMOPS_ISA neon_dotprod
#include "../simd/neon_dotprod.h"
// After the SIMD contract that it is written over.
#include "../kernels/kernels.inl"
