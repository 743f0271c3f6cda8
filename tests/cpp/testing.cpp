// Random problems.
#include "testing.h"

namespace slmops::testing {

namespace {

constexpr uint32_t kSpecial[] = {0x00000000, 0x80000000, 0x7f800000, 0xff800000, 0x7fc00000,
                                 0xffc12345, 0x7f800001, 0x00000001, 0x807fffff, 0x00800000,
                                 0x7f7fffff, 0x47800000, 0x477fefff, 0x477ff000, 0x33000000,
                                 0x03800000, 0x037fffff, 0x38800000, 0x387fffff, 0x3f800000};

uint16_t to_half(DType type, uint32_t bits) {
  if (type == DType::bf16) return static_cast<uint16_t>(bits >> 16);
  float x;
  memcpy(&x, &bits, sizeof(x));
  const Half half = static_cast<Half>(x);
  uint16_t out;
  memcpy(&out, &half, sizeof(out));
  return out;
}

}  // namespace

namespace {
bool signs = true;
}

void fill_without_signs() { signs = false; }

void fill(Random& random, DType type, float size, int special, void* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = random.unit() * size;
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    if (random.chance(special)) bits = random.pick(kSpecial);
    if (!signs) bits &= 0x7fffffffu;
    uint8_t* p = static_cast<uint8_t*>(out) + i * size_of(type);
    if (type == DType::f32) {
      memcpy(p, &bits, sizeof(bits));
    } else {
      const uint16_t half = to_half(type, bits);
      memcpy(p, &half, sizeof(half));
    }
  }
}

Format random_format(Random& random) {
  for (;;) {
    Format f = {};
    f.n = random.integer(1, 70);
    f.k = random.integer(1, 300);
    f.activations = random.pick({Activations::int8, Activations::int8, Activations::floating});
    if (random.chance(40)) {
      f.bits = 4;
      f.scale_kind = ScaleKind::sub16;
      f.scale_type = DType::f32;
      f.group = kSubGroup;
    } else {
      f.bits = random.chance(50) ? 4 : 8;
      f.scale_type = random.chance(50) ? DType::f16 : DType::bf16;
      f.zero_kind =
          random.pick({ZeroKind::none, ZeroKind::int16, ZeroKind::floating, ZeroKind::offset});
      f.group = random.pick({32, 64, 96, 128, 256, static_cast<int>((f.k + 31) / 32 * 32)});
    }
    const int64_t block = scale_block(f);
    f.act_group = random.pick({32, 64, 128, static_cast<int>((f.k + block - 1) / block * block)});
    if (complete(&f) == nullptr) return f;
  }
}

std::string describe(const Format& f) {
  char text[200];
  std::snprintf(
      text, sizeof(text),
      "bits %d, scale kind %d type %d, zero kind %d, activations %d, n %lld, k %lld, group %lld, "
      "act_group %lld",
      f.bits, static_cast<int>(f.scale_kind), static_cast<int>(f.scale_type),
      static_cast<int>(f.zero_kind), static_cast<int>(f.activations), static_cast<long long>(f.n),
      static_cast<long long>(f.k), static_cast<long long>(f.group),
      static_cast<long long>(f.act_group));
  return text;
}

Packed::Packed(const Format& f, Random& random)
    : format(f),
      codes(f.n * f.k),
      scale(f.scale_kind == ScaleKind::sub16 ? 4 * f.n : 2 * f.n * groups_per_row(f)),
      zero_point(f.zero_kind == ZeroKind::none ? 0 : 2 * f.n * groups_per_row(f)),
      sub_scale(f.scale_kind == ScaleKind::sub16 ? f.n * groups_per_row(f) : 0),
      data(f.total_bytes, 1) {
  const int64_t largest = (1 << f.bits) - 1;
  for (int64_t i = 0; i < codes.count(); ++i) {
    codes[i] = static_cast<uint8_t>(random.integer(0, largest));
  }
  for (int64_t i = 0; i < sub_scale.count(); ++i) {
    sub_scale[i] = static_cast<uint8_t>(random.integer(0, 15));
  }
  fill(random, f.scale_type, 0.1f, 0, scale.data(), scale.count() / size_of(f.scale_type));
  if (f.zero_kind == ZeroKind::floating || f.zero_kind == ZeroKind::offset) {
    fill(random, f.scale_type, 16.0f, 0, zero_point.data(), zero_point.count() / 2);
  }
  if (f.zero_kind == ZeroKind::int16) {
    for (int64_t i = 0; i < zero_point.count() / 2; ++i) {
      const int16_t z = static_cast<int16_t>(random.integer(0, largest));
      memcpy(zero_point.data() + 2 * i, &z, sizeof(z));
    }
  }
  pack_tiles(f, parts(), data.data(), 0, f.tiles);
  write_header(f, data.data());
}

}  // namespace slmops::testing
