// exp, sigmoid and the activations over the SIMD contract, once for all rows; included after its
// header. docs/arithmetic.md, "Functions", has formulas, domains and errors.
//
// Activations are x * F(x) with F(x) + F(-x) = 1, computed as max(x, 0) - a * F(-a), a = |x|: the
// tail F(-a) has no cancellation, and beyond the end where it is 0 the result is max(x, 0) itself.
#pragma once

#define SLMOPS_INLINE inline __attribute__((always_inline))
#define SLMOPS_NOINLINE __attribute__((noinline))

namespace slmops::SLMOPS_ISA {
namespace {

// (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2: coefficients of r^0, r^1, ... (minimax, relative error
// of e^r 2^-28).
constexpr float kExp[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.123a20p-7f,
                          0x1.6a23cep-10f};
// Phi(-a) e^(a^2 / 2) / t, t = 1 / (1 + kTailSlope a), on 0 <= a <= kGeluErfEnd: coefficients of
// t^0, t^1, ... (minimax, relative error 2^-25).
constexpr float kTail[] = {0x1.fea13cp-4f, 0x1.fef7b6p-4f,  0x1.ca5b68p-4f, 0x1.709db0p-4f,
                           0x1.c9517ep-5f, -0x1.948124p-9f, 0x1.33110ap-4f, -0x1.367f4ap-3f,
                           0x1.7770aep-4f, -0x1.38679cp-6f};
constexpr float kTailSlope = 0.3125f;
constexpr float kTanhLinear = 0x1.988454p+0f;  // 2 sqrt(2 / pi)
constexpr float kTanhCubic = 0x1.2444f2p-4f;   // that times 0.044715
// Where tails are 0 in fp32.
constexpr float kSiluEnd = 104.0f, kGeluTanhEnd = 10.8f, kGeluErfEnd = 14.6f;
constexpr float kTanhEnd = 10.0f;  // where tanh is 1 in fp32

SLMOPS_INLINE F32 abs(F32 x) { return from_bits(bits_of(x) & splat_i32(0x7fffffff)); }
SLMOPS_INLINE F32 negate(F32 x) { return splat(-0.0f) - x; }

/// c[0] + c[1] x + ..., by fma from the highest power down.
template <int kCount>
SLMOPS_INLINE F32 polynomial(const float (&c)[kCount], F32 x) {
  F32 y = splat(c[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) y = fma(y, x, splat(c[i]));
  return y;
}

/// e^x = 2^n (1 + rest), |rest| < 0.42.
struct Reduced {
  I32 n;
  F32 rest;
};
SLMOPS_INLINE Reduced reduce(F32 x) {
  const I32 n = round(x * splat(0x1.715476p+0f));  // log2(e)
  const F32 whole = to_f32(n);
  F32 r = fnma(whole, splat(0x1.62e430p-1f), x);  // ln(2) in two parts
  r = fnma(whole, splat(-0x1.05c610p-29f), r);
  return {n, fma(r * r, polynomial(kExp, r), r)};
}

/// e^x for -170 <= x <= 89. Results below 2^-126 are rounded a second time, to a denormal.
SLMOPS_INLINE F32 exp_inside(F32 x) {
  const Reduced e = reduce(x);
  return times_power(e.rest + splat(1.0f), e.n);
}

/// e^x; +0 below -104, infinity above 89, NaN for NaN.
SLMOPS_INLINE F32 exp(F32 x) {
  return select(is_nan(x), x, exp_inside(min(max(x, splat(-104.0f)), splat(89.0f))));
}

/// min(|x|, end), and `end` for NaN.
SLMOPS_INLINE F32 magnitude(F32 x, float end) {
  const F32 a = abs(x);
  return select(a < splat(end), a, splat(end));
}

/// max(x, 0), x itself for NaN and -0.
SLMOPS_INLINE F32 positive(F32 x) { return select(x < splat(0.0f), splat(0.0f), x); }

/// 1 / (1 + e^-x), NaN for NaN.
SLMOPS_INLINE F32 sigmoid(F32 x) {
  const F32 one = splat(1.0f), e = exp_inside(negate(magnitude(x, kSiluEnd)));
  return select(is_nan(x), x, select(x < splat(0.0f), e, one) / (one + e));
}

/// sigmoid(-a) for 0 <= a <= 170.
SLMOPS_INLINE F32 sigmoid_tail(F32 a) {
  const F32 e = exp_inside(negate(a));
  return e / (splat(1.0f) + e);
}

/// x * sigmoid(x).
SLMOPS_INLINE F32 silu(F32 x) {
  const F32 a = magnitude(x, kSiluEnd);
  return fnma(a, sigmoid_tail(a), positive(x));
}

/// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) = x * sigmoid(of twice that argument).
SLMOPS_INLINE F32 gelu_tanh(F32 x) {
  const F32 a = magnitude(x, kGeluTanhEnd);
  const F32 twice = a * fma(a * a, splat(kTanhCubic), splat(kTanhLinear));
  return fnma(a, sigmoid_tail(twice), positive(x));
}

/// x / 2 * (1 + erf(x / sqrt(2))) = x * Phi(x).
SLMOPS_INLINE F32 gelu_erf(F32 x) {
  const F32 a = magnitude(x, kGeluErfEnd), one = splat(1.0f), minus_half = splat(-0.5f);
  const F32 t = one / fma(a, splat(kTailSlope), one);
  // What the square loses in rounding comes back as e^-(lost / 2), to first order.
  const F32 square = a * a, lost = fma(a, a, negate(square));
  F32 e = exp_inside(square * minus_half);
  e = fma(e * minus_half, lost, e);
  return fnma(a, e * (t * polynomial(kTail, t)), positive(x));
}

/// tanh(x) = t / (t + 2) with t = e^2|x| - 1, with the sign of x; NaN for NaN.
SLMOPS_INLINE F32 tanh(F32 x) {
  const F32 a = magnitude(x, kTanhEnd);
  const Reduced e = reduce(a + a);
  const F32 power = from_bits(shift_left<23>(e.n + splat_i32(127)));
  const F32 t = fma(power, e.rest, power - splat(1.0f));
  const F32 y = t / (t + splat(2.0f));
  const I32 sign = bits_of(x) & splat_i32(INT32_MIN);
  return select(is_nan(x), x, from_bits(bits_of(y) + sign));
}

/// max(x, 0)^2, NaN for NaN.
SLMOPS_INLINE F32 relu2(F32 x) {
  const F32 y = positive(x);
  return y * y;
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
