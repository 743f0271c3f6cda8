// The `avx512_vnni` row over intrinsics in plain C++: the same kernels on a CPU that has no
// AVX-512.
#define SLMOPS_ISA avx512_emulated
#define SLMOPS_AVX512_EMULATION "../../tests/cpp/avx512_emulation.h"
#include "../../csrc/simd/avx512.h"
// After the SIMD contract that it is written over.
#include "../../csrc/kernels/kernels.inl"
