// The conversions of every row: all 16-bit inputs, and all 2^32 floats in a full run, against the
// compiler's own.
#include "testing.h"

namespace slmops::testing {
namespace {

constexpr uint32_t kCanonicalNan = 0x7fc00000u;

float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

/// The value of a 16-bit float, NaN canonical, without any code of the project.
uint32_t widened(DType type, uint16_t half) {
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  if (type == DType::f16) {
    Half value;
    memcpy(&value, &half, sizeof(value));
    bits = as_bits(static_cast<float>(value));
  }
  return is_nan(bits) ? kCanonicalNan : bits;
}

/// The nearest 16-bit float, ties to even, NaN canonical.
uint16_t narrowed(DType type, uint32_t bits) {
  if (is_nan(bits)) return type == DType::f16 ? 0x7e00 : 0x7fc0;
  if (type == DType::f16) {
    const Half value = static_cast<Half>(as_float(bits));
    uint16_t half;
    memcpy(&half, &value, sizeof(half));
    return half;
  }
  // The two neighbours, and the distance to the lower: no addition that could carry wrongly.
  const uint16_t below = static_cast<uint16_t>(bits >> 16);
  const uint32_t rest = bits & 0xffffu;
  const bool up = rest > 0x8000u || (rest == 0x8000u && (below & 1) != 0);
  return static_cast<uint16_t>(below + (up ? 1 : 0));
}

void test_widening(const KernelTable& kernels, const char* name, DType type) {
  constexpr int64_t kCount = 1 << 16;
  Block<uint16_t> in(kCount), same(kCount);
  Block<uint32_t> out(kCount);
  for (int64_t i = 0; i < kCount; ++i) in[i] = static_cast<uint16_t>(i);
  kernels.convert(in.data(), type, out.data(), DType::f32, kCount);
  kernels.convert(in.data(), type, same.data(), type, kCount);
  for (int64_t i = 0; i < kCount; ++i) {
    const uint32_t expected = widened(type, in[i]);
    EXPECT(out[i] == expected, "%s: type %d, %04x gave %08x, not %08x", name,
           static_cast<int>(type), in[i], out[i], expected);
    EXPECT(same[i] == narrowed(type, expected), "%s: type %d, %04x came back as %04x", name,
           static_cast<int>(type), in[i], same[i]);
  }
}

/// All floats whose low bits are those of `low` (with every combination of the upper 16).
void test_narrowing(const KernelTable& kernels, const char* name, DType type, uint32_t low) {
  constexpr int64_t kCount = 1 << 16;
  static Block<uint32_t> in(kCount);
  static Block<uint16_t> out(kCount);
  for (int64_t i = 0; i < kCount; ++i) in[i] = static_cast<uint32_t>(i) << 16 | low;
  kernels.convert(in.data(), DType::f32, out.data(), type, kCount);
  for (int64_t i = 0; i < kCount; ++i) {
    EXPECT(out[i] == narrowed(type, in[i]), "%s: type %d, %08x gave %04x, not %04x", name,
           static_cast<int>(type), in[i], out[i], narrowed(type, in[i]));
  }
}

void test_row(const KernelTable& kernels, const char* name, bool full) {
  // Ties of both types, their neighbours, and a few others.
  constexpr uint32_t kLows[] = {0,      1,      0x0fff, 0x1000, 0x1001, 0x2000, 0x3000, 0x5555,
                                0x7000, 0x7fff, 0x8000, 0x8001, 0xb000, 0xefff, 0xf000, 0xffff};
  for (const DType type : {DType::f16, DType::bf16}) {
    test_widening(kernels, name, type);
    if (full) {
      for (uint32_t low = 0; low < 1u << 16; ++low) test_narrowing(kernels, name, type, low);
    } else {
      for (const uint32_t low : kLows) test_narrowing(kernels, name, type, low);
    }
  }
  // Every length up to three vectors: tails neither read nor write beyond their block.
  for (int64_t count = 0; count < 48; ++count) {
    Block<uint32_t> in(count);
    Block<uint16_t> out(count);
    for (int64_t i = 0; i < count; ++i) in[i] = static_cast<uint32_t>(i) * 0x01234567u;
    kernels.convert(in.data(), DType::f32, out.data(), DType::bf16, count);
    for (int64_t i = 0; i < count; ++i) {
      EXPECT(out[i] == narrowed(DType::bf16, in[i]), "%s: element %lld of %lld", name,
             static_cast<long long>(i), static_cast<long long>(count));
    }
  }
}

}  // namespace

void test_convert(bool full) {
  test_row(*scalar_row().kernels, "scalar", full);
  for (const IsaRow& row : other_rows()) test_row(*row.kernels, row.name, full);
}

}  // namespace slmops::testing
