// `linear` of the `amx` row over intrinsics in plain C++: the same kernel on a CPU that has neither
// AVX-512 nor AMX. The row's other kernels are those of avx512_emulated.cpp.
#define SLMOPS_ISA amx_emulated
#define SLMOPS_AVX512_EMULATION "../../tests/cpp/avx512_emulation.h"
#define SLMOPS_AMX_EMULATION "../../tests/cpp/amx_emulation.h"
#include "../../csrc/simd/amx.h"
#include "../../csrc/simd/avx512.h"
// After the SIMD contract that they are written over.
#include "../../csrc/kernels/embedding.h"
#include "../../csrc/kernels/linear.h"
#include "../../csrc/kernels/quantize_rows.h"

namespace slmops::amx_emulated {

extern const KernelTable kernels;
constinit const KernelTable kernels = {
    .quantize_rows = quantize_rows,
    .widen_rows = widen_rows,
    .linear = linear,
    .embedding = embedding,
};

}  // namespace slmops::amx_emulated
