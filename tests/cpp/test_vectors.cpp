// Every row gives the bits of the scalar row: activations over a dense sweep (all 2^32 floats in a
// full run), norms and rotary on random problems; and sin_cos is near the C library's long double.
#include <algorithm>
#include <cmath>

#include "../../csrc/ops/sin_cos.h"
#include "testing.h"

namespace slmops::testing {
namespace {

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr Activation kActivations[] = {
    Activation::silu,    Activation::gelu_tanh, Activation::gelu_erf, Activation::relu2,
    Activation::sigmoid, Activation::exp,       Activation::tanh};

/// All floats whose low 16 bits are `low`, on all rows; emulation, a hundred times slower, if
/// asked.
void sweep(uint32_t low, bool emulated) {
  constexpr int64_t kCount = 1 << 16;
  static Block<float> x(kCount), expected(kCount), got(kCount);
  for (int64_t i = 0; i < kCount; ++i) {
    const uint32_t bits = static_cast<uint32_t>(i) << 16 | low;
    memcpy(&x[i], &bits, sizeof(bits));
  }
  for (const Activation a : kActivations) {
    scalar_row().kernels->activation(a, x.data(), expected.data(), kCount);
    for (const IsaRow& row : other_rows()) {
      if (row.requires_features == 0 && !emulated) continue;
      row.kernels->activation(a, x.data(), got.data(), kCount);
      EXPECT(got.same_bits(expected), "activation %d of floats with low bits %04x, %s",
             static_cast<int>(a), low, row.name);
    }
  }
}

/// Values of a type in a block of exact size at an odd address.
struct Values {
  Values(Random& random, DType element, int64_t elements, int special)
      : type(element), count(elements), data(elements * size_of(element), 1) {
    const float size = random.pick({1.0f, 1.0f, 100.0f, 1e-30f, 1e-38f, 1e30f});
    fill(random, type, size, special, data.data(), count);
  }
  DType type;
  int64_t count;
  Block<uint8_t> data;
};

int64_t span(int64_t rows, int64_t stride, int64_t k) {
  return rows == 0 ? 0 : (rows - 1) * stride + k;
}

void test_add(Random& random) {
  const int64_t rows = random.integer(0, 4), k = random.integer(0, 70), count = rows * k;
  const DType type = random.pick(kTypes);
  const int special = random.pick({0, 0, 1, 20});
  Block<uint8_t> x(count * size_of(type), 1), branch(count * size_of(type), 1);
  fill(random, type, 1.0f, special, x.data(), count);
  fill(random, type, 1.0f, special, branch.data(), count);
  const float factor = random.pick({1.0f, 0.22f, -1.0f});
  const auto run = [&](const KernelTable& kernels, Block<uint8_t>* out) {
    const SumArgs args = {.x = x.data(),
                          .branch = branch.data(),
                          .out = out->data(),
                          .type = type,
                          .factor = factor,
                          .k = k};
    for (int64_t row = rows; row-- > 0;) kernels.add(args, row, row + 1);
    Block<uint8_t> own(count * size_of(type), 1);
    std::copy_n(x.data(), x.count(), own.data());
    SumArgs in_place = args;
    in_place.x = in_place.out = own.data();
    kernels.add(in_place, 0, rows);
    EXPECT(own.same_bits(*out), "add of %lld in place, %lld at once", static_cast<long long>(k),
           static_cast<long long>(rows));
  };
  Block<uint8_t> expected(count * size_of(type), 1);
  run(*scalar_row().kernels, &expected);
  for (const IsaRow& row : other_rows()) {
    Block<uint8_t> got(count * size_of(type), 1);
    run(*row.kernels, &got);
    EXPECT(got.same_bits(expected), "add of %lld, type %d, %s", static_cast<long long>(count),
           static_cast<int>(type), row.name);
  }
}

void test_norm(Random& random) {
  const int64_t rows = random.integer(0, 4), k = random.integer(1, 100);
  const int64_t stride = k + random.integer(0, 5), other_stride = k + random.integer(0, 5);
  const DType type = random.pick(kTypes), out_type = random.pick(kTypes);
  const int special = random.pick({0, 0, 0, 1, 20});
  const Values x(random, type, span(rows, stride, k), special);
  const Values residual(random, type, span(rows, other_stride, k), special);
  const Values weight(random, random.pick(kTypes), k, special);
  NormArgs args = {.norm = {.weight = weight.data.data(),
                            .type = weight.type,
                            .eps = random.pick({0.0f, 1e-6f, 1e-5f}),
                            .offset = random.pick({0.0f, 0.0f, 1.0f, 0.3f}),
                            .cast = random.pick(kTypes)},
                   .x = x.data.data(),
                   .type = type,
                   .stride = stride,
                   .out = nullptr,
                   .out_type = out_type,
                   .k = k};
  struct Result {
    Result(const NormArgs& a, int64_t count)
        : normed(count * size_of(a.out_type), 1),
          total(count * size_of(a.type), 1),
          alone(count * size_of(a.out_type), 1) {}
    Block<uint8_t> normed, total, alone;
  };
  const auto run = [&](const KernelTable& kernels, Result* out) {
    AddNormArgs add = {.norm = args,
                       .residual = residual.data.data(),
                       .residual_stride = other_stride,
                       .sum = out->total.data()};
    add.norm.out = out->normed.data();
    kernels.add_rms_norm(add, 0, rows);
    NormArgs plain = args;  // of the sum: the same once more
    plain.x = out->total.data();
    plain.stride = k;
    plain.out = out->alone.data();
    for (int64_t row = rows; row-- > 0;) kernels.rms_norm(plain, row, row + 1);
    EXPECT(out->alone.same_bits(out->normed), "add_rms_norm is not rms_norm of its sum");
    if (type == out_type) {  // in place, as in scratch
      plain.out = out->total.data();
      kernels.rms_norm(plain, 0, rows);
    }
  };
  Result expected(args, rows * k);
  run(*scalar_row().kernels, &expected);
  if (type == out_type) EXPECT(expected.total.same_bits(expected.normed), "in place");
  for (const IsaRow& row : other_rows()) {
    Result got(args, rows * k);
    run(*row.kernels, &got);
    EXPECT(got.normed.same_bits(expected.normed) && got.total.same_bits(expected.total),
           "norm of %lld rows, k %lld, type %d, %s", static_cast<long long>(rows),
           static_cast<long long>(k), static_cast<int>(type), row.name);
  }
}

void test_rotary(Random& random) {
  const int64_t batch = random.integer(0, 2), length = random.integer(1, 3);
  const int64_t heads = random.integer(1, 3), d = random.integer(1, 100);
  const int64_t r = 2 * random.integer(0, d / 2), head_stride = d + random.integer(0, 3);
  const int64_t items = batch * length * heads;
  const bool shared = random.chance(50);
  const int special = random.pick({0, 0, 1, 20});
  const Values x(random, random.pick(kTypes), span(items, head_stride, d), special);
  const Values cos(random, random.pick(kTypes), (shared ? 1 : batch) * length * r, special);
  const Values sin(random, cos.type, cos.count, special);
  RotaryArgs args = {.x = x.data.data(),
                     .type = x.type,
                     .batch_stride = length * heads * head_stride,
                     .length_stride = heads * head_stride,
                     .head_stride = head_stride,
                     .length = length,
                     .heads = heads,
                     .d = d,
                     .cos = cos.data.data(),
                     .sin = sin.data.data(),
                     .angle_type = cos.type,
                     .angle_batch_stride = shared ? 0 : length * r,
                     .r = r,
                     .interleaved = random.chance(50),
                     .out = nullptr};
  Block<uint8_t> expected(items * d * size_of(x.type), 1);
  args.out = expected.data();
  scalar_row().kernels->rotary(args, 0, items);
  for (const IsaRow& row : other_rows()) {
    Block<uint8_t> got(expected.count(), 1);
    args.out = got.data();
    for (int64_t item = items; item-- > 0;) row.kernels->rotary(args, item, item + 1);
    EXPECT(got.same_bits(expected), "rotary of %lld of %lld elements, interleaved %d, type %d, %s",
           static_cast<long long>(r), static_cast<long long>(d), args.interleaved,
           static_cast<int>(x.type), row.name);
    if (head_stride != d) continue;
    Block<uint8_t> in_place(expected.count(), 1);
    memcpy(in_place.data(), x.data.data(), static_cast<size_t>(in_place.bytes()));
    RotaryArgs over = args;
    over.x = over.out = in_place.data();
    row.kernels->rotary(over, 0, items);
    EXPECT(in_place.same_bits(expected), "rotary in place, %s", row.name);
  }
}

void check_angle(double x) {
  const SinCos got = sin_cos(x);
  const long double wide = x;
  const double sine = static_cast<double>(got.sin - std::sin(wide));
  const double cosine = static_cast<double>(got.cos - std::cos(wide));
  EXPECT(std::fabs(sine) <= 0x1p-51 && std::fabs(cosine) <= 0x1p-51,
         "x = %.17g: errors %.3g and %.3g", x, sine, cosine);
}

}  // namespace

void test_activations(bool full) {
  // Zero bits as in bf16, ends, and a few others.
  for (const uint32_t low : {0, 1, 0x5555, 0x7fff, 0x8000, 0xabcd, 0xffff}) sweep(low, true);
  for (uint32_t low = 0; full && low < 1u << 16; ++low) sweep(low, false);
}

void test_vectors(int cases) {
  Random random(11);
  for (int i = 0; i < cases; ++i) {
    test_norm(random);
    test_add(random);
    test_rotary(random);
  }
}

void test_sin_cos(int angles) {
  Random random(12);
  for (int i = 0; i < angles; ++i) {
    const double size = std::ldexp(1.0, static_cast<int>(random.integer(-60, 30)));
    check_angle(static_cast<double>(random.integer(-(1ll << 53), 1ll << 53)) * 0x1p-53 * size);
    // The float64 nearest to a multiple of pi/4: where the reduction cancels most.
    check_angle(static_cast<double>(random.integer(0, 1 << 30)) * 0x1.921fb54442d18p-1);
  }
  for (const double x : {0.0, -0.0, kLargestAngle, -kLargestAngle, 0x1p-1074}) check_angle(x);
}

}  // namespace slmops::testing
