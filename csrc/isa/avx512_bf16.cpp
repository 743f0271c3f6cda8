// Beside the rows `avx512_vnni` and `amx`: activations="float_fast" on CPUs with AVX-512 BF16.
#define SLMOPS_ISA avx512_bf16
#include "../simd/avx512_bf16.h"

#include "../simd/no_matrix.h"
// After the SIMD contract that it is written over.
#include "../kernels/linear_fast.h"

namespace slmops::SLMOPS_ISA {

extern const FastKernels kernels;
constinit const FastKernels kernels = {.round_rows = round_rows, .linear = linear_fast};

}  // namespace slmops::SLMOPS_ISA
