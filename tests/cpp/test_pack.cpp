// The packed bytes stand where docs/packed-format.md says, and unpack_tiles brings everything back.
#include "testing.h"

namespace slmops::testing {
namespace {

uint16_t half_at(const uint8_t* p) {
  uint16_t half;
  memcpy(&half, p, sizeof(half));
  return half;
}

/// The formulas of docs/packed-format.md, written down a second time.
struct Layout {
  const Format& f;
  int64_t block, block_bytes, tile_bytes;

  explicit Layout(const Format& format) : f(format) {
    const bool sub16 = f.scale_kind == ScaleKind::sub16;
    const int64_t zero_bytes = f.zero_kind == ZeroKind::none ? 0 : 64;
    block = sub16 ? 64 : f.group;
    block_bytes = sub16 ? 1088 : (f.bits == 4 ? 16 : 32) * f.group + 64 + zero_bytes;
    tile_bytes = f.k_padded / block * block_bytes + (sub16 ? 128 : 0);
  }
  int64_t at(int64_t n, int64_t k) const {
    return 64 + n / 32 * tile_bytes + k / block * block_bytes;
  }
  int code(const uint8_t* p, int64_t n, int64_t k) const {
    const int64_t in_block = k % block, lane = n % 32 / 16 * 64 + n % 16 * 4 + k % 4;
    if (f.bits == 8) return p[at(n, k) + in_block / 4 * 128 + lane];
    const uint8_t byte = p[at(n, k) + in_block / 8 * 128 + lane];
    return in_block % 8 < 4 ? byte & 15 : byte >> 4;
  }
  int64_t scale(int64_t n, int64_t k) const {
    return at(n, k) + (f.bits == 4 ? 16 : 32) * f.group + 2 * (n % 32);
  }
};

int expected_code(Packed& packed, int64_t n, int64_t k) {
  const Format& f = packed.format;
  if (n >= f.n) return 0;
  if (k < f.k) return packed.codes[n * f.k + k];
  if (f.zero_kind == ZeroKind::none) return f.bits == 4 ? 8 : 128;
  const int64_t g = k / f.group, groups = (f.k + f.group - 1) / f.group;
  if (f.zero_kind != ZeroKind::int16 || g >= groups) return 0;
  return half_at(packed.zero_point.data() + 2 * (n * groups + g));
}

void check_group_scales(Packed& packed, const Layout& layout) {
  const Format& f = packed.format;
  const int64_t groups = (f.k + f.group - 1) / f.group;
  for (int64_t n = 0; n < f.tiles * 32; ++n) {
    for (int64_t g = 0; g * f.group < f.k_padded; ++g) {
      const bool present = n < f.n && g < groups;
      const int64_t at = layout.scale(n, g * f.group), from = 2 * (n * groups + g);
      const uint16_t scale = present ? half_at(packed.scale.data() + from) : 0;
      EXPECT(half_at(packed.data.data() + at) == scale, "%s", describe(f).c_str());
      if (f.zero_kind == ZeroKind::none) continue;
      const uint16_t zero = present ? half_at(packed.zero_point.data() + from) : 0;
      EXPECT(half_at(packed.data.data() + at + 64) == zero, "%s", describe(f).c_str());
    }
  }
}

void check_sub_scales(Packed& packed, const Layout& layout) {
  const Format& f = packed.format;
  const int64_t groups = (f.k + 15) / 16;
  for (int64_t n = 0; n < f.tiles * 32; ++n) {
    for (int64_t g = 0; g * 16 < f.k_padded; ++g) {
      const int64_t j = g % 4;
      const uint8_t byte = packed.data[layout.at(n, g * 16) + 1024 + 2 * (n % 32) + j / 2];
      const int sub = n < f.n && g < groups ? packed.sub_scale[n * groups + g] : 0;
      EXPECT((j % 2 == 0 ? byte & 15 : byte >> 4) == sub, "%s", describe(f).c_str());
    }
    const uint8_t zero[4] = {};
    const uint8_t* scale = n < f.n ? packed.scale.data() + 4 * n : zero;
    const int64_t at = 64 + (n / 32 + 1) * layout.tile_bytes - 128 + 4 * (n % 32);
    EXPECT(memcmp(packed.data.data() + at, scale, 4) == 0, "%s", describe(f).c_str());
  }
}

void check_unpack(Packed& packed) {
  const Format& f = packed.format;
  Block<uint8_t> codes(packed.codes.count()), scale(packed.scale.count());
  Block<uint8_t> zero_point(packed.zero_point.count()), sub_scale(packed.sub_scale.count());
  const Parts parts = {codes.data(), scale.data(), zero_point.data(), sub_scale.data()};
  for (int64_t tile = f.tiles; tile-- > 0;) {
    unpack_tiles(f, packed.data.data(), parts, tile, tile + 1);
  }
  EXPECT(codes.same_bits(packed.codes) && scale.same_bits(packed.scale) &&
             zero_point.same_bits(packed.zero_point) && sub_scale.same_bits(packed.sub_scale),
         "%s", describe(f).c_str());
}

}  // namespace

void test_pack() {
  Random random(2);
  for (int i = 0; i < 300; ++i) {
    Packed packed(random_format(random), random);
    const Format& f = packed.format;
    const Layout layout(f);
    EXPECT(packed.data.count() == 64 + f.tiles * layout.tile_bytes, "%s", describe(f).c_str());
    for (int64_t n = 0; n < f.tiles * 32; ++n) {
      for (int64_t k = 0; k < f.k_padded; ++k) {
        EXPECT(layout.code(packed.data.data(), n, k) == expected_code(packed, n, k),
               "n %lld, k %lld: %s", static_cast<long long>(n), static_cast<long long>(k),
               describe(f).c_str());
      }
    }
    if (f.scale_kind == ScaleKind::sub16) {
      check_sub_scales(packed, layout);
    } else {
      check_group_scales(packed, layout);
    }
    check_unpack(packed);
  }
}

}  // namespace slmops::testing
