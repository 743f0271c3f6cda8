// One call of a kernel, for tools/arm/cost.py to count its instructions: `cost ROW KERNEL M`.
//
// What prepares the call runs on the scalar row, so that only the call itself executes code of ROW.
// So blocks of codes hold anything: the call does not depend on it.
#include "../../tests/cpp/testing.h"

namespace slmops::testing {
namespace {

constexpr int64_t kK = 1024;  // of linear: one tile of 32 outputs

struct Problem {
  const char* name;
  Format format;
};

constexpr Problem kProblems[] = {
    {"int4-g32",
     {.bits = 4, .scale_type = DType::f16, .n = 32, .k = kK, .group = 32, .act_group = 128}},
    {"int4-g128",
     {.bits = 4, .scale_type = DType::f16, .n = 32, .k = kK, .group = 128, .act_group = 128}},
    {"int4-sub16",
     {.bits = 4,
      .scale_kind = ScaleKind::sub16,
      .scale_type = DType::f32,
      .n = 32,
      .k = kK,
      .group = 16,
      .act_group = 128}},
    {"int8-g32",
     {.bits = 8, .scale_type = DType::f16, .n = 32, .k = kK, .group = 32, .act_group = 32}},
    {"int8-g128",
     {.bits = 8, .scale_type = DType::f16, .n = 32, .k = kK, .group = 128, .act_group = 128}},
};

void run_linear(const KernelTable& kernels, Format f, int64_t m) {
  EXPECT(complete(&f) == nullptr, "%s", describe(f).c_str());
  Random random(1);
  Packed packed(f, random);
  Block<float> x(m * f.k), y(m * f.n);
  fill(random, DType::f32, 1.0f, 0, x.data(), x.count());
  Activations8 activations(f, m);
  const QuantizedRows rows = activations.rows();
  scalar_row().kernels->quantize_rows(f, {x.data(), DType::f32, f.k, nullptr}, rows, 0, m);
  Block<uint8_t> scratch(scratch_bytes(f, m) + 64);
  const uint64_t aligned = (reinterpret_cast<uint64_t>(scratch.data()) + 63) / 64 * 64;
  const LinearArgs args = {.format = &f,
                           .packed = packed.data.data(),
                           .rows = rows,
                           .x = nullptr,
                           .bias = nullptr,
                           .bias_type = DType::f32,
                           .out = y.data(),
                           .out_type = DType::f32,
                           .out_stride = f.n,
                           .first_row = 0,
                           .first_output = 0,
                           .scratch = reinterpret_cast<uint8_t*>(aligned)};
  kernels.linear(args, 0, 0, m);
}

/// m queries of one head on 256 keys, 64 wide: one split, all of it seen.
void run_attention(const KernelTable& kernels, int64_t m) {
  constexpr int64_t kD = 64;
  Random random(1);
  Block<float> q(m * kD), out(m * kD);
  Block<uint16_t> k(kSplit * kD), v(kSplit * kD);
  fill(random, DType::f32, 1.0f, 0, q.data(), q.count());
  fill(random, DType::bf16, 1.0f, 0, k.data(), k.count());
  fill(random, DType::bf16, 1.0f, 0, v.data(), v.count());
  AttentionArgs args = {};
  args.q = {q.data(), DType::f32, m * kD, kD, kD};
  args.k = {k.data(), DType::bf16, kSplit * kD, kD, kD};
  args.v = {v.data(), DType::bf16, kSplit * kD, kD, kD};
  args.batch = args.heads = args.kv_heads = args.blocks = 1;
  args.queries = args.block = m;
  args.keys = kSplit;
  args.d = args.dv = kD;
  args.scale = 0.125f;
  args.out = out.data();
  Block<uint8_t> scratch(attention_scratch_bytes(args) + 64);
  const uint64_t aligned = (reinterpret_cast<uint64_t>(scratch.data()) + 63) / 64 * 64;
  kernels.attention(args, 0, 1, reinterpret_cast<uint8_t*>(aligned));
}

int run(const char* row_name, const std::string& kernel, int64_t m) {
  const IsaRow* row = select(system_features(), row_name);
  EXPECT(row != nullptr, "%s cannot run here", row_name);
  if (kernel == "attention") {
    run_attention(*row->kernels, m);
    return 0;
  }
  for (const Problem& problem : kProblems) {
    if (kernel != problem.name) continue;
    run_linear(*row->kernels, problem.format, m);
    return 0;
  }
  EXPECT(false, "no kernel %s", kernel.c_str());
}

}  // namespace
}  // namespace slmops::testing

int main(int argc, char** argv) {
  using namespace slmops::testing;
  EXPECT(argc == 4, "usage: cost ROW KERNEL M");
  return run(argv[1], argv[2], std::atoll(argv[3]));
}
