// Every row gives the bits of the scalar row: heads and gate, from fp32 scratch of exact size.
#include <algorithm>

#include "testing.h"

namespace slmops::testing {
namespace {

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr Activation kActivations[] = {Activation::silu, Activation::gelu_tanh,
                                       Activation::gelu_erf, Activation::relu2};

/// fp32 values at an address that only floats have to fit.
struct Floats {
  Floats(Random& random, int64_t count, int special) : data(count) {
    fill(random, DType::f32, random.pick({1.0f, 100.0f, 1e-30f, 1e30f}), special, data.data(),
         count);
  }
  Block<float> data;
};

void test_heads(Random& random) {
  const int64_t batch = random.integer(1, 2), length = random.integer(1, 3);
  const int64_t d = random.integer(1, 70), rows = batch * length;
  HeadsArgs args = {};
  int64_t all = 0;
  for (int64_t& heads : args.heads) all += heads = random.integer(1, 3);
  const int special = random.pick({0, 0, 1, 20});
  const bool full_width = random.chance(30), shared = random.chance(50);
  const int64_t r = 2 * random.integer(0, d / 2);
  const Floats x(random, rows * all * d, special);
  const Floats cos(random, (shared ? 1 : batch) * length * r, special);
  const Floats sin(random, (shared ? 1 : batch) * length * r, special);
  const Floats weight(random, 3 * d, special);
  args.d = d;
  args.type = random.pick(kTypes);
  for (int part = 0; part < 2; ++part) {
    args.norm[part] = {weight.data.data(), DType::f32, 1e-6f, random.pick({0.0f, 1.0f}),
                       DType::f32};
    args.norm_width[part] = full_width ? args.heads[part] * d : random.pick({int64_t{0}, d});
  }
  args.length = length;
  args.cos = r > 0 ? cos.data.data() : nullptr;
  args.sin = r > 0 ? sin.data.data() : nullptr;
  args.angle_type = DType::f32;
  args.angle_batch_stride = shared ? 0 : length * r;
  args.r = r;
  args.interleaved = random.chance(50);
  const bool heads_first = random.chance(50), blocked = random.chance(50);
  const int64_t slots = 48, first_slot = random.integer(0, slots - length);

  // A piece of heads at a time, unless a norm wants them all.
  const int64_t piece = full_width ? all : random.integer(1, all);
  struct Result {
    Result(const HeadsArgs& a, int64_t count, int64_t keys)
        : q(count * a.heads[0] * a.d * size_of(a.type), 1),
          k(keys * a.heads[1] * a.d * size_of(a.type), 1),
          v(count * a.heads[2] * a.d * size_of(a.type), 1) {}
    Block<uint8_t> q, k, v;
  };
  const auto run = [&](const KernelTable& kernels, int64_t at_once, Result* out) {
    HeadsArgs mine = args;
    uint8_t* parts[3] = {out->q.data(), out->k.data(), out->v.data()};
    for (int part = 0; part < 3; ++part) {
      const int64_t heads = mine.heads[part];
      mine.out[part] = heads_first ? HeadsOut{parts[part], heads * length * d, d, length * d}
                                   : HeadsOut{parts[part], length * heads * d, heads * d, d};
    }
    std::fill_n(out->k.data(), out->k.count(), uint8_t{0});  // what is free stays
    if (blocked)
      mine.out[1] = {parts[1],  mine.heads[1] * slots * d, 0,
                     slots * d, HeadsLayout::key_blocks,   first_slot};
    for (int64_t head = 0; head < all; head += at_once) {
      const int64_t count = std::min(at_once, all - head);
      Block<float> scratch(rows * count * d);
      for (int64_t row = 0; row < rows; ++row) {
        std::copy_n(x.data.data() + (row * all + head) * d, count * d,
                    scratch.data() + row * count * d);
      }
      kernels.heads(mine, scratch.data(), count * d, 0, rows, head, count);
    }
  };
  const int64_t keys = blocked ? batch * slots : rows;
  Result expected(args, rows, keys);
  run(*scalar_row().kernels, all, &expected);
  for (const IsaRow& row : other_rows()) {
    Result got(args, rows, keys);
    run(*row.kernels, piece, &got);
    EXPECT(
        got.q.same_bits(expected.q) && got.k.same_bits(expected.k) && got.v.same_bits(expected.v),
        "heads of %lld, r %lld, type %d, %s", static_cast<long long>(d), static_cast<long long>(r),
        static_cast<int>(args.type), row.name);
  }
}

void test_gate(Random& random) {
  Format f = random_format(random);
  f.k = random.integer(1, 300);
  f.activations = Activations::int8;
  if (complete(&f) != nullptr) return;
  const bool wide = random.chance(30) || f.act_group > 128;
  const int64_t rows = random.integer(1, 4);
  const int64_t span = wide ? 64 : std::max<int64_t>(f.act_group, 64);
  const Floats x(random, rows * 2 * ((f.k + 31) / 32 * 32), random.pick({0, 0, 1, 20}));
  GateArgs args = {
      .down = &f, .activation = random.pick(kActivations), .rows = {}, .wide = nullptr};
  struct Result {
    Result(const Format& format, int64_t count)
        : codes(count * format.k_padded),
          scale(count * (format.k_padded / format.act_group)),
          presets(count * presets_per_row(format)),
          h(count * format.k_padded) {}
    Block<int8_t> codes;
    Block<float> scale;
    Block<int32_t> presets;  // a row's own business
    Block<float> h;
  };
  const auto run = [&](const KernelTable& kernels, Result* out) {
    GateArgs mine = args;
    mine.rows = {out->codes.data(), out->scale.data(), out->presets.data()};
    if (wide) mine.wide = out->h.data();
    for (int64_t column = 0; column < f.k_padded; column += span) {
      const int64_t columns = std::min(span, f.k_padded - column);
      const int64_t given = std::clamp<int64_t>(f.k - column, 0, columns);
      const int64_t pairs = (given + 31) / 32;
      Block<float> scratch(rows * 2 * columns);
      for (int64_t row = 0; row < rows; ++row) {
        std::copy_n(x.data.data() + row * 2 * ((f.k + 31) / 32 * 32) + 2 * column, pairs * 64,
                    scratch.data() + row * 2 * columns);
      }
      kernels.gate(mine, scratch.data(), 0, rows, column, columns, given);
    }
    // Which NaN h holds is nobody's business.
    kernels.convert(out->h.data(), DType::f32, out->h.data(), DType::f32, out->h.count());
  };
  Result expected(f, rows);
  run(*scalar_row().kernels, &expected);
  for (const IsaRow& row : other_rows()) {
    Result got(f, rows);
    run(*row.kernels, &got);
    EXPECT(got.codes.same_bits(expected.codes) && got.scale.same_bits(expected.scale) &&
               got.h.same_bits(expected.h),
           "gate of %s, %s", describe(f).c_str(), row.name);
  }
}

}  // namespace

void test_fused(int cases) {
  Random random(11);
  for (int i = 0; i < cases; ++i) {
    test_heads(random);
    test_gate(random);
  }
}

}  // namespace slmops::testing
