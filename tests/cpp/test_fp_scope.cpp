// FpScope: whatever state the caller is in, kernels compute in the contract's, and the caller gets
// its own back.
#include <cfenv>

#include "../../csrc/ops/fp_scope.h"
#include "testing.h"

namespace slmops::testing {
namespace {

#if defined(__x86_64__)
using State = uint32_t;
State state() { return _mm_getcsr() & 0xffc0u; }  // without the sticky exception flags
void set_state(State s) { _mm_setcsr(s); }
// flush-to-zero; denormals-are-zero; both; round down; round to zero with both; an unmasked
// exception
constexpr State kDefault = 0x1f80;
constexpr State kOthers[] = {0x9f80, 0x1fc0, 0x9fc0, 0x3f80, 0xffc0, 0x1e80};
constexpr State kFlush = 0x9fc0;
#elif defined(__aarch64__)
using State = uint64_t;
State state() {
  State s;
  asm volatile("mrs %0, fpcr" : "=r"(s));
  return s;
}
void set_state(State s) { asm volatile("msr fpcr, %0" : : "r"(s) : "memory"); }
// flush-to-zero; default NaN; both; round down; round to zero with both
constexpr State kDefault = 0;
constexpr State kOthers[] = {1u << 24, 1u << 25, 3u << 24, 2u << 22, 3u << 22 | 3u << 24};
constexpr State kFlush = 1u << 24;
#endif

float product(float a, float b) {
  volatile float x = a, y = b;
  return x * y;
}

void test_states() {
  for (const State other : kOthers) {
    set_state(other);
    {
      const FpScope outer;
      const bool outer_is_default = state() == kDefault;
      set_state(kFlush);
      bool inner_is_default, flush_came_back;
      {
        const FpScope inner;
        inner_is_default = state() == kDefault;
      }
      flush_came_back = state() == kFlush;
      set_state(kDefault);
      EXPECT(outer_is_default && inner_is_default && flush_came_back, "caller's state %llx",
             static_cast<unsigned long long>(other));
    }
    const State after = state();
    set_state(kDefault);
    EXPECT(after == other, "restored %llx instead of %llx", static_cast<unsigned long long>(after),
           static_cast<unsigned long long>(other));
  }
}

/// Denormal inputs and outputs through every kernel, with and without the caller's flush setting.
void test_kernels_under_flush(const KernelTable& kernels, const char* name) {
  constexpr int64_t kCount = 4096;
  Random random(7);
  Block<float> in(kCount);
  Block<uint16_t> plain(kCount), flushed(kCount);
  for (int64_t i = 0; i < kCount; ++i) in[i] = random.unit() * 0x1p-130f;
  kernels.convert(in.data(), DType::f32, plain.data(), DType::bf16, kCount);

  Format f = {.bits = 8,
              .activations = Activations::floating,
              .n = 32,
              .k = 64,
              .group = 32,
              .act_group = 32};
  EXPECT(complete(&f) == nullptr, "%s", describe(f).c_str());
  Packed packed(f, random);
  Block<float> x(f.k), y(f.n), y_flushed(f.n);
  for (int64_t k = 0; k < f.k; ++k) x[k] = random.unit() * 0x1p-128f;
  Block<uint8_t> scratch(scratch_bytes(f, 1));
  LinearArgs args = {.format = &f,
                     .packed = packed.data.data(),
                     .rows = {},
                     .x = x.data(),
                     .bias = nullptr,
                     .bias_type = DType::f32,
                     .out = y.data(),
                     .out_type = DType::f32,
                     .out_stride = f.n,
                     .scratch = scratch.data()};
  kernels.linear(args, 0, 0, 1);
  args.out = y_flushed.data();
  set_state(kFlush);
  const bool flushes = product(0x1p-126f, 0.25f) == 0;
  {
    const FpScope scope;
    kernels.convert(in.data(), DType::f32, flushed.data(), DType::bf16, kCount);
    kernels.linear(args, 0, 0, 1);
  }
  set_state(kDefault);
  EXPECT(flushes, "the caller's flush setting had no effect: this test tests nothing");
  EXPECT(plain.same_bits(flushed), "%s: convert", name);
  EXPECT(y.same_bits(y_flushed), "%s: linear", name);
}

}  // namespace

void test_fp_scope() {
  test_states();
  test_kernels_under_flush(*scalar_row().kernels, "scalar");
  for (const IsaRow& row : other_rows()) test_kernels_under_flush(*row.kernels, row.name);
}

}  // namespace slmops::testing
