// store_int8_: heads rounded to int8 codes with a scale per head and slot, into blocks of 16 slots.
#include "int8_heads.h"

#include <torch/csrc/stable/library.h>

#include "parallel.h"

namespace slmops {
namespace {

constexpr char kOp[] = "store_int8_";
constexpr int64_t kCost = 16;  // of an element, in multiply-adds

void store_int8(const Tensor& x, Tensor codes, Tensor scale, int64_t start, bool values) {
  SLMOPS_CHECK(x.dim() == 4, kOp, ": expected x of shape (batch, length, heads, head_dim), got ",
               shape(x));
  const int64_t batch = x.size(0), length = x.size(1), heads = x.size(2), d = x.size(3);
  SLMOPS_CHECK(d >= 1 && d <= kMostKeyElements, kOp, ": expected a head_dim in 1..",
               kMostKeyElements, ", got ", d);
  constexpr int64_t kMostSlots = int64_t{1} << 53;
  SLMOPS_CHECK(start >= 0 && start <= kMostSlots, kOp, ": expected start of 0 or more, got ",
               start);
  const Tensor owner = d == 1 || x.stride(3) == 1 ? x : to_contiguous(x);
  const StoreArgs args = {
      .x = owner.const_data_ptr(),
      .type = float_type(kOp, "x", x.scalar_type()),
      .batch_stride = owner.stride(0),
      .length_stride = owner.stride(1),
      .head_stride = owner.stride(2),
      .length = length,
      .heads = heads,
      .d = d,
      .out = int8_view(kOp, "codes", codes, scale, {batch, heads, d, start + length, values, true}),
      .values = values,
      .first_slot = start};
  const int64_t items = batch * length * heads;
  const KernelTable& table = kernels();
  parallel(items, share_count(items, kCost * d),
           [&](int64_t, int64_t begin, int64_t end) { table.store_int8(args, begin, end); });
}

}  // namespace

Int8View int8_view(const char* op, const char* argument, const Tensor& codes, const Tensor& scale,
                   const Int8Sizes& sizes) {
  const int64_t width = padded_head(sizes.d), blocks = (sizes.slots + kKeyBlock - 1) / kKeyBlock;
  const int64_t inner[3] = {sizes.values ? 4 : width / 4, sizes.values ? width : kKeyBlock, 4};
  check_type(op, argument, codes, ScalarType::Byte);
  const bool fits = codes.dim() == 6 && codes.size(0) == sizes.batch &&
                    codes.size(1) == sizes.heads && codes.size(2) >= blocks &&
                    codes.size(3) == inner[0] && codes.size(4) == inner[1] &&
                    codes.size(5) == inner[2] && codes.stride(2) == kKeyBlock * width &&
                    codes.stride(3) == inner[1] * 4 && codes.stride(4) == 4 && codes.stride(5) == 1;
  SLMOPS_CHECK(fits, op, ": expected ", argument, " of shape (", sizes.batch, ", ", sizes.heads,
               ", at least ", blocks, ", ", inner[0], ", ", inner[1], ", 4), those of a head ",
               "contiguous, got ", shape(codes));
  check_type(op, "the scale", scale, ScalarType::Float);
  SLMOPS_CHECK(scale.dim() == 3 && scale.size(0) == sizes.batch && scale.size(1) == sizes.heads &&
                   scale.size(2) >= sizes.slots && (scale.size(2) <= 1 || scale.stride(2) == 1),
               op, ": expected the scale of ", argument, " of shape (", sizes.batch, ", ",
               sizes.heads, ", at least ", sizes.slots, "), its last dimension contiguous, got ",
               shape(scale));
  // Where they are only read, Int8View is one struct for both directions.
  const auto data = [&](const Tensor& t) {
    return sizes.written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
  };
  return {.codes = static_cast<uint8_t*>(data(codes)),
          .batch_stride = codes.stride(0),
          .head_stride = codes.stride(1),
          .scale = static_cast<float*>(data(scale)),
          .scale_batch_stride = scale.stride(0),
          .scale_head_stride = scale.stride(1)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def("store_int8_(Tensor x, Tensor(a!) codes, Tensor(b!) scale, int start, bool values) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("store_int8_", TORCH_BOX(&store_int8)); }

}  // namespace slmops
