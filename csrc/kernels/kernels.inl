// One ISA row: all kernels over the SIMD header that the including file chose, and their table.
//
// A row with a matrix unit names the header of that part of the contract in SLMOPS_MATRIX.
#ifndef SLMOPS_MATRIX
#define SLMOPS_MATRIX "../simd/no_matrix.h"
#endif
#include SLMOPS_MATRIX

#include "attention.h"
#include "embedding.h"
#include "expand.h"
#include "gate.h"
#include "heads.h"
#include "linear.h"
#include "quantize_weight.h"

namespace slmops::SLMOPS_ISA {

extern const KernelTable kernels;
constinit const KernelTable kernels = {
    .quantize_rows = quantize_rows,
    .widen_rows = widen_rows,
    .linear = linear,
    .embedding = embedding,
    .expand = expand_tile,
    .quantize_weight = quantize_weight,
    .rms_norm = rms_norm,
    .add_rms_norm = add_rms_norm,
    .add = add,
    .rotary = rotary,
    .heads = heads,
    .gate = gate,
    .store_int8 = store_int8,
    .attention = attention,
    .attention_merge = attention_merge,
    .activation = apply_activation,
    .convert = convert,
};

}  // namespace slmops::SLMOPS_ISA
