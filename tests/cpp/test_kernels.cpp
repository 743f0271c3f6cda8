// Every row gives the bits of the scalar row: quantize_rows, widen_rows, linear and embedding on
// random problems.
#include <algorithm>

#include "testing.h"

namespace slmops::testing {
namespace {

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};

/// Activations, bias and what else a call takes, in blocks of exact size.
struct Inputs {
  Inputs(const Format& format, int64_t rows, Random& random)
      : f(format),
        m(rows),
        type(random.pick(kTypes)),
        stride(f.k + (random.chance(30) ? random.integer(1, 20) : 0)),
        x(m == 0 ? 0 : ((m - 1) * stride + f.k) * size_of(type)),
        bias_type(random.pick(kTypes)),
        bias(f.n * size_of(bias_type)),
        has_bias(random.chance(50)),
        perm(f.k),
        has_perm(random.chance(30)),
        out_type(random.pick(kTypes)),
        out_stride(f.n + (random.chance(20) ? 5 : 0)) {
    const float size = random.pick({1.0f, 1.0f, 100.0f, 1e-30f, 1e-38f, 1e30f});
    fill(random, type, size, random.pick({0, 0, 0, 1, 30}), x.data(), x.count() / size_of(type));
    fill(random, bias_type, 1.0f, random.pick({0, 0, 5}), bias.data(), f.n);
    for (int64_t k = 0; k < f.k; ++k) perm[k] = k;
    for (int64_t k = f.k - 1; k > 0; --k) std::swap(perm[k], perm[random.integer(0, k)]);
  }
  SourceRows source() const { return {x.data(), type, stride, has_perm ? perm.data() : nullptr}; }

  const Format& f;
  int64_t m;
  DType type;
  int64_t stride;
  Block<uint8_t> x;
  DType bias_type;
  Block<uint8_t> bias;
  bool has_bias;
  Block<int64_t> perm;
  bool has_perm;
  DType out_type;
  int64_t out_stride;
};

/// What a row made of the inputs.
struct Outputs {
  explicit Outputs(const Inputs& in)
      : activations(in.f, in.m),
        widened(in.m * in.f.k_padded),
        y(in.m == 0 ? 0 : ((in.m - 1) * in.out_stride + in.f.n) * size_of(in.out_type)) {}
  Activations8 activations;  // of which presets and blocks are a row's own business
  Block<float> widened;
  Block<uint8_t> y;
};

/// Runs the walk of ops/linear.cpp; `block` rows at a time, few or a multiple of kCodeRows.
void run(const KernelTable& kernels, Packed& packed, const Inputs& in, int64_t block,
         Outputs* out) {
  const Format& f = packed.format;
  const QuantizedRows rows = out->activations.rows();
  kernels.widen_rows(f, in.source(), out->widened.data(), 0, in.m);
  for (int64_t i = in.m; i-- > 0;) kernels.quantize_rows(f, in.source(), rows, i, i + 1);
  Block<uint8_t> scratch(scratch_bytes(f, std::min(block, in.m)));
  const LinearArgs args = {.format = &f,
                           .packed = packed.data.data(),
                           .rows = rows,
                           .x = out->widened.data(),
                           .bias = in.has_bias ? in.bias.data() : nullptr,
                           .bias_type = in.bias_type,
                           .out = out->y.data(),
                           .out_type = in.out_type,
                           .out_stride = in.out_stride,
                           .scratch = scratch.data()};
  for (int64_t tile = f.tiles; tile-- > 0;) {
    for (int64_t i = 0; i < in.m; i += block) {
      kernels.linear(args, tile, i, std::min(i + block, in.m));
    }
  }
}

void test_linear(Packed& packed, int64_t m, Random& random) {
  const Format& f = packed.format;
  const Inputs in(f, m, random);
  Outputs expected(in);
  run(*scalar_row().kernels, packed, in, m + 1, &expected);
  for (const IsaRow& row : linear_rows()) {
    int64_t block = random.integer(1, m + 1);
    if (block > kFewRows) block = (block + kCodeRows - 1) / kCodeRows * kCodeRows;
    Outputs got(in);
    run(*row.kernels, packed, in, block, &got);
    const std::string what = describe(f) + ", m " + std::to_string(m) + ", " + row.name;
    const Activations8 &x = got.activations, &y = expected.activations;
    EXPECT(x.codes.same_bits(y.codes), "codes: %s", what.c_str());
    EXPECT(x.scale.same_bits(y.scale), "activation scales: %s", what.c_str());
    EXPECT(got.widened.same_bits(expected.widened), "widened rows: %s", what.c_str());
    EXPECT(got.y.same_bits(expected.y), "outputs, %lld rows at a time: %s",
           static_cast<long long>(block), what.c_str());
  }
}

void test_embedding(Packed& packed, Random& random) {
  const Format& f = packed.format;
  const DType type = random.pick(kTypes);
  Block<int64_t> ids(random.integer(0, 9));
  for (int64_t i = 0; i < ids.count(); ++i) ids[i] = random.integer(0, f.n - 1);
  Block<uint8_t> expected(ids.count() * f.k * size_of(type));
  scalar_row().kernels->embedding(f, packed.data.data(), ids.data(), ids.count(), type,
                                  expected.data());
  for (const IsaRow& row : linear_rows()) {
    Block<uint8_t> got(expected.count());
    row.kernels->embedding(f, packed.data.data(), ids.data(), ids.count(), type, got.data());
    EXPECT(got.same_bits(expected), "embedding: %s, %s", describe(f).c_str(), row.name);
  }
}

/// One output of a weight of equal codes on a row of equal activations: the largest int32 sums
/// there can be.
void test_limit(Format f, int code, int sub, int zero, double expected_sum) {
  f.n = 17;
  f.k = f.act_group;
  f.activations = Activations::int8;
  EXPECT(complete(&f) == nullptr, "%s", describe(f).c_str());
  Random random(5);
  Packed packed(f, random);
  memset(packed.codes.data(), code, static_cast<size_t>(packed.codes.count()));
  memset(packed.sub_scale.data(), sub, static_cast<size_t>(packed.sub_scale.count()));
  for (int64_t i = 0; i < packed.zero_point.count() / 2; ++i) {
    const int16_t z = static_cast<int16_t>(zero);
    memcpy(packed.zero_point.data() + 2 * i, &z, sizeof(z));
  }
  const float one = 1.0f;
  const uint16_t half_one = 0x3c00;
  for (int64_t i = 0; i < packed.scale.count() / size_of(f.scale_type); ++i) {
    uint8_t* p = packed.scale.data() + i * size_of(f.scale_type);
    if (f.scale_type == DType::f32) memcpy(p, &one, sizeof(one));
    if (f.scale_type == DType::f16) memcpy(p, &half_one, sizeof(half_one));
  }
  pack_tiles(f, packed.parts(), packed.data.data(), 0, f.tiles);

  // More than any row's registers hold and a matrix unit takes: large batches have their own paths.
  constexpr int64_t kRows = 17;
  Inputs in(f, kRows, random);
  in.type = DType::f32;
  in.stride = f.k;
  in.has_bias = in.has_perm = false;
  in.out_type = DType::f32;
  in.out_stride = f.n;
  Block<float> x(f.k);
  for (int64_t k = 0; k < f.k; ++k) x[k] = 127.0f;  // code 127, activation scale 1
  const SourceRows source = {x.data(), DType::f32, 0, nullptr};
  std::vector<IsaRow> all = linear_rows();
  all.push_back(scalar_row());
  for (const IsaRow& row : all) {
    Outputs got(in);
    Block<float> y(kRows * f.n);
    Block<uint8_t> scratch(scratch_bytes(f, kRows));
    const QuantizedRows rows = got.activations.rows();
    row.kernels->quantize_rows(f, source, rows, 0, kRows);
    const LinearArgs args = {.format = &f,
                             .packed = packed.data.data(),
                             .rows = rows,
                             .x = nullptr,
                             .bias = nullptr,
                             .bias_type = DType::f32,
                             .out = y.data(),
                             .out_type = DType::f32,
                             .out_stride = f.n,
                             .scratch = scratch.data()};
    row.kernels->linear(args, 0, 0, kRows);
    row.kernels->linear(args, 0, 0, 1);
    for (int64_t i = 0; i < y.count(); ++i) {
      EXPECT(y[i] == static_cast<float>(expected_sum), "%s: got %.9g, not %.9g: %s", row.name,
             static_cast<double>(y[i]), expected_sum, describe(f).c_str());
    }
  }
}

}  // namespace

void test_kernels(int cases) {
  Random random(3);
  for (int i = 0; i < cases; ++i) {
    Packed packed(random_format(random), random);
    test_linear(packed, i % 10, random);
    if (i % 10 == 9) test_linear(packed, random.integer(10, 30), random);
    test_embedding(packed, random);
  }
}

/// Many rows, and spans, groups and activation groups of many lengths: what a matrix unit takes,
/// and what it does not.
void test_matrix(int cases) {
  Random random(11);
  for (int i = 0; i < cases;) {
    Format f = random_format(random);
    f.activations = Activations::int8;
    f.n = random.integer(17, 33);
    f.k = random.integer(1, 1700);
    if (f.scale_kind == ScaleKind::group) f.group = random.pick({32, 64, 96, 128, 256, 512, 1120});
    const int64_t block = scale_block(f);
    f.act_group = random.pick({32, 64, 128, static_cast<int>((f.k + block - 1) / block * block)});
    if (complete(&f) != nullptr) continue;
    Packed packed(f, random);
    test_linear(packed, random.integer(16, 70), random);
    ++i;
  }
}

void test_limits(int part) {
  const int k8 = 65536 / part, k4 = (1 << 20) / part, sub = (1 << 17) / part;
  const Format int8 = {.bits = 8, .zero_kind = ZeroKind::none, .group = k8, .act_group = k8};
  test_limit(int8, 0, 0, 128, 127.0 * -128 * k8);
  test_limit(int8, 255, 0, 128, 127.0 * 127 * k8);
  Format with_zero = int8;
  with_zero.zero_kind = ZeroKind::int16;
  test_limit(with_zero, 0, 0, 255, 127.0 * -255 * k8);
  test_limit(with_zero, 255, 0, 0, 127.0 * 255 * k8);
  Format int4 = {.bits = 4, .zero_kind = ZeroKind::int16, .group = k4, .act_group = k4};
  test_limit(int4, 0, 0, 15, 127.0 * -15 * k4);
  test_limit(int4, 15, 0, 0, 127.0 * 15 * k4);
  const Format sub16 = {.bits = 4,
                        .scale_kind = ScaleKind::sub16,
                        .scale_type = DType::f32,
                        .group = kSubGroup,
                        .act_group = sub};
  test_limit(sub16, 0, 15, 8, 127.0 * -8 * 15 * sub);
  test_limit(sub16, 15, 15, 8, 127.0 * 7 * 15 * sub);
}

}  // namespace slmops::testing
