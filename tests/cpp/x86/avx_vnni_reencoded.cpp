// The `avx_vnni` row for a CPU with AVX-512 VNNI: run.sh compiles it with the row's own flags and
// lets the assembler encode the same vpdpbusd and vpdpwssd, of the same registers, with EVEX.
#define SLMOPS_ISA avx_vnni_reencoded
#include "../../../csrc/simd/avx_vnni_dots.h"
// After the SIMD contract that it is written over.
#include "../../../csrc/kernels/kernels.inl"
