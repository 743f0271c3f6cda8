// rotary_table: cos and sin of position * inv_freq, times `scaling`: float64 in a fixed order of
// operations, then one rounding to fp32.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "check.h"
#include "parallel.h"
#include "sin_cos.h"

namespace slmops {
namespace {

constexpr char kOp[] = "rotary_table";
constexpr int64_t kCost = 64;  // multiply-adds that an angle is worth
constexpr int64_t kMaxRank = 64;
// Beyond, converting a position to float64 would round it.
constexpr int64_t kLargestPosition = int64_t{1} << 53;

/// Every angle within the domain of sin_cos.
void check_angles(const int64_t* positions, int64_t count, const double* inv_freq, int64_t pairs) {
  double frequency = 0.0;
  for (int64_t i = 0; i < pairs; ++i) {
    const double f = inv_freq[i] < 0 ? -inv_freq[i] : inv_freq[i];
    SLMOPS_CHECK(f <= kLargestAngle, kOp, ": expected inv_freq of at most 2^30, got ", inv_freq[i]);
    frequency = std::max(frequency, f);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t p = positions[i];
    const bool fits = p >= -kLargestPosition && p <= kLargestPosition &&
                      static_cast<double>(p < 0 ? -p : p) * frequency <= kLargestAngle;
    SLMOPS_CHECK(fits, kOp, ": expected |position| * inv_freq of at most 2^30, got position ", p,
                 " for inv_freq up to ", frequency);
  }
}

std::tuple<Tensor, Tensor> rotary_table(const Tensor& positions, const Tensor& inv_freq,
                                        double scaling, bool interleaved) {
  check_type(kOp, "positions", positions, ScalarType::Long);
  check_type(kOp, "inv_freq", inv_freq, ScalarType::Double);
  SLMOPS_CHECK(inv_freq.dim() == 1, kOp, ": expected inv_freq of one dimension, got shape ",
               shape(inv_freq));
  const int64_t rank = positions.dim(), pairs = inv_freq.numel();
  SLMOPS_CHECK(rank < kMaxRank, kOp, ": expected positions of fewer than ", kMaxRank,
               " dimensions, got ", rank);
  const Tensor at = to_contiguous(positions), frequencies = to_contiguous(inv_freq);
  const int64_t* position = static_cast<const int64_t*>(at.const_data_ptr());
  const double* frequency = static_cast<const double*>(frequencies.const_data_ptr());
  const int64_t count = at.numel();
  check_angles(position, count, frequency, pairs);

  int64_t sizes[kMaxRank];
  std::copy_n(positions.sizes().data(), rank, sizes);
  sizes[rank] = 2 * pairs;
  Tensor cos = new_tensor(sizes, rank + 1, ScalarType::Float);
  Tensor sin = new_tensor(sizes, rank + 1, ScalarType::Float);
  float* cosines = static_cast<float*>(cos.mutable_data_ptr());
  float* sines = static_cast<float*>(sin.mutable_data_ptr());
  // Where pair i has its two entries.
  const int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : pairs;
  parallel(count, share_count(count, kCost * pairs), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < pairs; ++i) {
        const SinCos angle = sin_cos(static_cast<double>(position[row]) * frequency[i]);
        const int64_t first = row * 2 * pairs + i * step, second = first + apart;
        cosines[first] = cosines[second] = static_cast<float>(angle.cos * scaling);
        sines[first] = sines[second] = static_cast<float>(angle.sin * scaling);
      }
    }
  });
  return {cos, sin};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def(
      "rotary_table(Tensor positions, Tensor inv_freq, float scaling, bool interleaved=False) -> "
      "(Tensor cos, Tensor sin)");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("rotary_table", TORCH_BOX(&rotary_table)); }

}  // namespace slmops
