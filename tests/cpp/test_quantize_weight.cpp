// Every row chooses the codes and scales of the scalar row.
#include <algorithm>

#include "testing.h"

namespace slmops::testing {
namespace {

struct Result {
  Result(const QuantizeArgs& args, int64_t groups)
      : codes(args.n * args.k),
        scale(args.scale_kind == ScaleKind::sub16 ? args.n * 4 : args.n * groups * 2),
        zero_point(args.symmetric ? 0 : args.n * groups),
        sub_scale(args.scale_kind == ScaleKind::sub16 ? args.n * groups : 0),
        range(2) {}
  Block<uint8_t> codes, scale;
  Block<int16_t> zero_point;
  Block<uint8_t> sub_scale;
  Block<float> range;
};

void run(const KernelTable& kernels, QuantizeArgs args, Result* out) {
  Block<float> scratch(quantize_scratch_floats(args.k, args.group));
  args.scratch = scratch.data();
  args.out = {out->codes.data(), out->scale.data(), out->zero_point.data(), out->sub_scale.data()};
  kernels.quantize_weight(args, 0, (args.n + 15) / 16, out->range.data());
}

/// Random options over a random weight, whose rows are in turn ordinary, constant, zero and of
/// extreme size.
void test_one(Random& random) {
  QuantizeArgs args = {};
  args.type = random.pick({DType::f32, DType::bf16, DType::f16});
  args.n = random.integer(1, 40);
  args.k = random.integer(1, 200);
  args.stride = args.k + (random.chance(30) ? 7 : 0);
  args.mse = random.chance(60);
  if (random.chance(40)) {
    args.bits = 4;
    args.scale_kind = ScaleKind::sub16;
    args.scale_type = DType::f32;
    args.symmetric = true;
    args.group = kSubGroup;
  } else {
    args.bits = random.chance(50) ? 4 : 8;
    args.scale_type = random.chance(50) ? DType::f16 : DType::bf16;
    args.symmetric = random.chance(50);
    args.group = std::min<int64_t>(random.pick({1, 7, 16, 32, 40, 64, 128, 200}), args.k);
  }
  Block<uint8_t> w(((args.n - 1) * args.stride + args.k) * size_of(args.type));
  args.w = w.data();
  for (int64_t n = 0; n < args.n; ++n) {
    const float size = random.pick({0.0f, 1e-3f, 0.05f, 0.05f, 1.0f, 6e4f, 1e-30f});
    uint8_t* row = w.data() + n * args.stride * size_of(args.type);
    fill(random, args.type, size, 0, row, args.k);
    if (!random.chance(10)) continue;
    for (int64_t k = 1; k < args.k; ++k) {
      memcpy(row + k * size_of(args.type), row, static_cast<size_t>(size_of(args.type)));
    }
  }
  Block<float> importance(args.k);
  for (int64_t k = 0; k < args.k; ++k) importance[k] = random.unit() * 0.5f + 0.5f;
  args.importance = random.chance(40) ? importance.data() : nullptr;

  const int64_t groups = (args.k + args.group - 1) / args.group;
  Result expected(args, groups);
  run(*scalar_row().kernels, args, &expected);
  const int largest = (1 << args.bits) - 1;
  for (int64_t i = 0; i < expected.codes.count(); ++i) {
    EXPECT(expected.codes[i] <= largest, "code %d of %d bits", expected.codes[i], args.bits);
  }
  for (const IsaRow& row : other_rows()) {
    Result got(args, groups);
    run(*row.kernels, args, &got);
    const bool same = got.codes.same_bits(expected.codes) && got.scale.same_bits(expected.scale) &&
                      got.zero_point.same_bits(expected.zero_point) &&
                      got.sub_scale.same_bits(expected.sub_scale) &&
                      got.range.same_bits(expected.range);
    EXPECT(same, "%s: bits %d, scale kind %d, symmetric %d, mse %d, n %lld, k %lld, group %lld",
           row.name, args.bits, static_cast<int>(args.scale_kind), args.symmetric, args.mse,
           static_cast<long long>(args.n), static_cast<long long>(args.k),
           static_cast<long long>(args.group));
  }
}

}  // namespace

void test_quantize_weight(int cases) {
  Random random(4);
  for (int i = 0; i < cases; ++i) test_one(random);
}

}  // namespace slmops::testing
