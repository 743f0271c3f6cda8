// activations="float_fast" by torch's own matrix product (oneDNN, MKL, on Arm the Arm Compute
// Library): a panel of the weight is unpacked to floats, multiplied, and forgotten.
#pragma once
#include "matmul.h"

namespace slmops {

/// Whether a product of so many rows goes through torch.
bool by_library(const Format& f, int64_t rows);

/// Rows of a slab whose outputs, `row_bytes` each, wait in scratch for what comes after them.
int64_t library_slab_rows(int64_t row_bytes);

/// linear of x [.., k], all checked; bias [n] or none.
Tensor library_linear(const Tensor& x, const Format& f, const uint8_t* packed,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& perm,
                      ScalarType out_type);

}  // namespace slmops
