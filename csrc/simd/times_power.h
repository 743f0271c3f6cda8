// x * 2^n for rows without an instruction for it; included after what it is made of.
#pragma once

namespace slmops::SLMOPS_ISA {
namespace {

/// 2^floor(n / 2) for -252 <= n < 256; n + 1 gives the other half of 2^n.
inline F32 half_power(I32 n) {
  return from_bits(shift_left<23>(shift_right<1>(n + splat_i32(254))));
}

// Two factors, as 2^n itself leaves fp32 at both ends.
inline F32 times_power(F32 x, I32 n) { return x * half_power(n) * half_power(n + splat_i32(1)); }

}  // namespace
}  // namespace slmops::SLMOPS_ISA
