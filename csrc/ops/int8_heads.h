// Keys or values as int8 in blocks of 16 slots, and their scales: two tensors, checked.
#pragma once
#include "check.h"

namespace slmops {

struct Int8Sizes {
  int64_t batch, heads, d, slots;  // slots: at least so many
  bool values, written;            // written: the caller may change them
};

/// codes: uint8 [batch, heads, blocks, p / 4, 16, 4], of values [batch, heads, blocks, 4, p, 4], p
/// = padded_head(d), those of a head contiguous; scale: float32 [batch, heads, slots].
Int8View int8_view(const char* op, const char* argument, const Tensor& codes, const Tensor& scale,
                   const Int8Sizes& sizes);

}  // namespace slmops
