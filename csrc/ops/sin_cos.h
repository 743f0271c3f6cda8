// sin and cos of a float64 in plain IEEE operations of a fixed order: the same bits on every CPU,
// which no C library promises. The error is below 2^-51 for |x| <= 2^30.
//
// x = n pi/2 + r, |r| <= pi/4 (a rounding more), and Taylor polynomials of r.
#pragma once
#include <cstdint>

namespace slmops {

constexpr double kLargestAngle = 0x1p30;

struct SinCos {
  double sin, cos;
};

/// |x| <= kLargestAngle.
inline SinCos sin_cos(double x) {
  // pi/2 in two parts whose products with |n| < 2^31 are exact, as are the differences, and a
  // third.
  constexpr double kHigh = 0x1.921fbp+0, kMiddle = 0x1.5110bp-22, kLow = 0x1.18469898cc517p-44;
  constexpr double kMagic = 0x1.8p52;  // the sum's last bit is worth 1: it rounds to an integer
  const double n = (x * 0x1.45f306dc9c883p-1 + kMagic) - kMagic;  // 2/pi
  const double r = ((x - n * kHigh) - n * kMiddle) - n * kLow;
  const double s = r * r;
  // The first terms left out are below 2^-64: r^19 / 19! and r^18 / 18!.
  constexpr double kSin[] = {
      -1.0 / 6,        1.0 / 120,        -1.0 / 5040,          1.0 / 362880,
      -1.0 / 39916800, 1.0 / 6227020800, -1.0 / 1307674368000, 1.0 / 355687428096000};
  constexpr double kCos[] = {
      -1.0 / 2,       1.0 / 24,        -1.0 / 720,         1.0 / 40320,
      -1.0 / 3628800, 1.0 / 479001600, -1.0 / 87178291200, 1.0 / 20922789888000};
  double sine = kSin[7], cosine = kCos[7];
  for (int i = 6; i >= 0; --i) {
    sine = sine * s + kSin[i];
    cosine = cosine * s + kCos[i];
  }
  sine = r + r * (s * sine);
  cosine = 1.0 + s * cosine;
  switch (static_cast<int64_t>(n) & 3) {
    case 0:
      return {sine, cosine};
    case 1:
      return {cosine, -sine};
    case 2:
      return {-sine, -cosine};
    default:
      return {-cosine, sine};
  }
}

}  // namespace slmops
