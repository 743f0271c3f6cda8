// quantize: a float weight to codes and scales, by the kernels of docs/arithmetic.md, "Choosing
// codes".
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../isa/isa.h"
#include "check.h"
#include "parallel.h"
#include "scratch.h"
#include "text.h"

namespace slmops {
namespace {

constexpr char kOp[] = "quantize";
constexpr int64_t kBlockRows = 16;  // rows of one kernel call
// What fp16 holds with its full precision; scales beyond are stored as bf16.
constexpr float kLeastHalf = 0x1p-14f;
constexpr float kLargestHalf = 65504.0f;

struct Options {
  int32_t bits;
  ScaleKind scale_kind;
  bool symmetric;
  bool mse;
  int64_t group;
};

/// A weight's rows as the kernels read them.
struct Weight {
  const void* data;
  DType type;
  int64_t n, k, stride;
};

struct Range {
  float least = std::numeric_limits<float>::infinity();
  float largest = 0;
};

void check_finite(const Weight& w) {
  std::atomic<bool> finite{true};
  parallel(w.n, share_count(w.n, w.k), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* values =
          static_cast<const uint8_t*>(w.data) + row * w.stride * size_of(w.type);
      if (!is_finite(values, w.k, w.type)) finite.store(false, std::memory_order_relaxed);
    }
  });
  SLMOPS_CHECK(finite.load(), kOp, ": expected finite weights, got an infinity or a NaN");
}

void check_importance(const Tensor& importance, int64_t k) {
  check_type(kOp, "importance", importance, ScalarType::Float);
  check_shape(kOp, "importance", importance, {k});
  const float* values = static_cast<const float*>(importance.const_data_ptr());
  for (int64_t i = 0; i < k; ++i) {
    SLMOPS_CHECK(values[i] >= 0 && values[i] <= std::numeric_limits<float>::max(), kOp,
                 ": expected importance to be finite and not negative, got ", values[i],
                 " at position ", i);
  }
}

Options check_options(int64_t bits, const std::string& scale_kind, int64_t group_size,
                      bool symmetric, const std::string& search, int64_t k) {
  Options options = {};
  options.scale_kind = parse_scale_kind(kOp, scale_kind);
  options.symmetric = symmetric;
  SLMOPS_CHECK(bits == 4 || bits == 8, kOp, ": expected bits 4 or 8, got ", bits);
  options.bits = static_cast<int32_t>(bits);
  SLMOPS_CHECK(search == "mse" || search == "absmax", kOp,
               ": expected search \"mse\" or \"absmax\", got \"", search, "\"");
  options.mse = search == "mse";
  if (options.scale_kind == ScaleKind::sub16) {
    SLMOPS_CHECK(bits == 4 && symmetric, kOp,
                 ": expected bits 4 and symmetric for scale_kind \"sub16\", got bits ", bits,
                 symmetric ? "" : " and asymmetric", "; use scale_kind \"group\"");
    SLMOPS_CHECK(group_size == kSubGroup || group_size == -1, kOp,
                 ": expected group_size 16 (or -1) for scale_kind \"sub16\", got ", group_size);
    options.group = kSubGroup;
  } else {
    SLMOPS_CHECK(group_size >= 1 || group_size == -1, kOp,
                 ": expected group_size to be positive or -1 (one group), got ", group_size);
    options.group = group_size == -1 ? k : std::min(group_size, k);
  }
  return options;
}

/// Fills `out` with all rows; returns the range of non-zero |scale| before its rounding.
Range run(const Weight& w, const Options& options, DType scale_type, const float* importance,
          const Parts& out) {
  const QuantizeArgs args = {.w = w.data,
                             .type = w.type,
                             .n = w.n,
                             .k = w.k,
                             .stride = w.stride,
                             .bits = options.bits,
                             .scale_kind = options.scale_kind,
                             .symmetric = options.symmetric,
                             .mse = options.mse,
                             .group = options.group,
                             .scale_type = scale_type,
                             .importance = importance,
                             .out = out,
                             .scratch = nullptr};
  const int64_t blocks = (w.n + kBlockRows - 1) / kBlockRows;
  const int64_t shares = share_count(blocks, kBlockRows * w.k * 8);
  Scratch scratch;
  const WorkerScratch pieces = scratch.take_each(
      shares, quantize_scratch_floats(w.k, options.group) * int64_t{sizeof(float)});
  std::vector<Range> ranges(static_cast<size_t>(shares));
  const KernelTable& table = kernels();
  parallel(blocks, shares, [&](int64_t share, int64_t begin, int64_t end) {
    QuantizeArgs mine = args;
    mine.scratch = reinterpret_cast<float*>(pieces.of(share));
    float range[2] = {Range{}.least, Range{}.largest};
    table.quantize_weight(mine, begin, end, range);
    ranges[static_cast<size_t>(share)] = {range[0], range[1]};
  });
  Range all;
  for (const Range& range : ranges) {
    all.least = std::min(all.least, range.least);
    all.largest = std::max(all.largest, range.largest);
  }
  return all;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(const Tensor& w, int64_t bits, Text scale_kind,
                                                    int64_t group_size, bool symmetric, Text search,
                                                    const std::optional<Tensor>& importance) {
  const std::string kind_name = scale_kind.take(), search_name = search.take();
  SLMOPS_CHECK(w.dim() == 2 && w.numel() > 0, kOp,
               ": expected w of shape (n, k) with n and k at least 1, got ", shape(w));
  const int64_t n = w.size(0), k = w.size(1);
  const DType type = float_type(kOp, "w", w.scalar_type());
  const Options options = check_options(bits, kind_name, group_size, symmetric, search_name, k);
  const bool rows_fit = k == 1 || w.stride(1) == 1;
  const Tensor rows = rows_fit ? w : torch::stable::contiguous(w);
  const Weight weight = {rows.const_data_ptr(), type, n, k, rows.stride(0)};
  std::optional<Tensor> weights_of_k;
  if (importance.has_value()) {
    weights_of_k = to_contiguous(*importance);
    check_importance(*weights_of_k, k);
  }
  check_finite(weight);

  const int64_t groups = (k + options.group - 1) / options.group;
  const bool sub16 = options.scale_kind == ScaleKind::sub16;
  Tensor codes = new_tensor({n, k}, ScalarType::Byte);
  Tensor scale =
      sub16 ? new_tensor({n}, ScalarType::Float) : new_tensor({n, groups}, ScalarType::Half);
  Tensor zero_point =
      symmetric ? new_tensor({0}, ScalarType::Short) : new_tensor({n, groups}, ScalarType::Short);
  Tensor sub_scale =
      sub16 ? new_tensor({n, groups}, ScalarType::Byte) : new_tensor({0}, ScalarType::Byte);
  Parts out = {static_cast<uint8_t*>(codes.mutable_data_ptr()), scale.mutable_data_ptr(),
               zero_point.mutable_data_ptr(), static_cast<uint8_t*>(sub_scale.mutable_data_ptr())};
  const float* importance_data =
      weights_of_k ? static_cast<const float*>(weights_of_k->const_data_ptr()) : nullptr;

  const Range range = run(weight, options, sub16 ? DType::f32 : DType::f16, importance_data, out);
  if (!sub16 && range.largest > 0 && (range.least < kLeastHalf || range.largest > kLargestHalf)) {
    scale = new_tensor({n, groups}, ScalarType::BFloat16);
    out.scale = scale.mutable_data_ptr();
    run(weight, options, DType::bf16, importance_data, out);
  }
  return {codes, scale, zero_point, sub_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def(
      "quantize(Tensor w, int bits, str scale_kind, int group_size, bool symmetric, str search, "
      "Tensor? importance=None) -> (Tensor codes, Tensor scale, Tensor zero_point, Tensor "
      "sub_scale)");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("quantize", TORCH_BOX(&quantize)); }

}  // namespace slmops
