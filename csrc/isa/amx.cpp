// The `amx` row: every kernel over csrc/simd/avx512.h, integer dots of many rows over
// csrc/simd/amx.h.
#define SLMOPS_ISA amx
#include "../simd/avx512.h"
#define SLMOPS_MATRIX "../simd/amx.h"
// After the SIMD contract that it is written over.
#include "../kernels/kernels.inl"
