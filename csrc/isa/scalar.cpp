// The `scalar` row: every kernel over csrc/simd/scalar.h.
#define SLMOPS_ISA scalar
#include "../simd/scalar.h"
// After the SIMD contract that it is written over.
#include "../kernels/kernels.inl"
