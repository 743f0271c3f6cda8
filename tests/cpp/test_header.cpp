// read_header refuses whatever write_header did not write, and looks at nothing outside the buffer.
#include <algorithm>

#include "testing.h"

namespace slmops::testing {
namespace {

/// Why a copy of `bytes`, in a heap block of exactly that size, is refused; null if it is read.
const char* read_copy(const std::vector<uint8_t>& bytes, int64_t offset, Format* f) {
  Block<uint8_t> block(static_cast<int64_t>(bytes.size()), offset);
  std::copy(bytes.begin(), bytes.end(), block.data());
  return read_header(block.data(), bytes.size(), f);
}

void test_every_byte(const std::vector<uint8_t>& good) {
  Format f;
  for (size_t at = 0; at < static_cast<size_t>(kHeaderBytes); ++at) {
    for (int value = 0; value < 256; ++value) {
      std::vector<uint8_t> bytes = good;
      if (bytes[at] == value) continue;
      bytes[at] = static_cast<uint8_t>(value);
      EXPECT(read_copy(bytes, 1, &f) != nullptr, "byte %zu = %d was accepted", at, value);
    }
  }
}

void test_every_length(const std::vector<uint8_t>& good) {
  Format f;
  for (size_t size = 0; size < good.size(); ++size) {
    const std::vector<uint8_t> cut(good.begin(), good.begin() + static_cast<int64_t>(size));
    EXPECT(read_copy(cut, 3, &f) != nullptr, "%zu of %zu bytes were accepted", size, good.size());
  }
  std::vector<uint8_t> longer = good;
  longer.push_back(0);
  EXPECT(read_copy(longer, 0, &f) != nullptr, "a longer buffer was accepted");
}

/// Headers with a right checksum over arbitrary fields: what passes has sizes that fit its buffer.
void test_forged(const std::vector<uint8_t>& good, Random& random) {
  const int64_t extremes[] = {0,         -1,       1, 31, 32, 33, 64, 1 << 20, int64_t{1} << 40,
                              INT64_MAX, INT64_MIN};
  int accepted = 0;
  for (int i = 0; i < 200000; ++i) {
    Format forged;
    EXPECT(read_copy(good, 0, &forged) == nullptr, "the original was refused");
    // write_header takes any format, so it forges checksums too.
    for (int64_t* field :
         {&forged.n, &forged.k, &forged.group, &forged.act_group, &forged.total_bytes}) {
      if (random.chance(20))
        *field = random.chance(50) ? random.pick(extremes) : random.integer(1, 300);
    }
    if (random.chance(20)) forged.bits = static_cast<int32_t>(random.integer(0, 255));
    if (random.chance(20)) forged.scale_kind = static_cast<ScaleKind>(random.integer(0, 255));
    if (random.chance(20)) forged.scale_type = static_cast<DType>(random.integer(0, 3));
    if (random.chance(20)) forged.zero_kind = static_cast<ZeroKind>(random.integer(0, 4));
    if (random.chance(20)) forged.activations = static_cast<Activations>(random.integer(0, 3));
    std::vector<uint8_t> bytes = good;
    write_header(forged, bytes.data());
    Format read;
    if (read_copy(bytes, i % 8, &read) != nullptr) continue;
    ++accepted;
    EXPECT(read.total_bytes == static_cast<int64_t>(bytes.size()), "%s", describe(read).c_str());
    EXPECT(read.tiles * read.tile_bytes + kHeaderBytes == read.total_bytes, "%s",
           describe(read).c_str());
    EXPECT(read.k_padded >= read.k && read.tiles * kTile >= read.n, "%s", describe(read).c_str());
  }
  EXPECT(accepted > 0, "no forged header was accepted: the test forges nothing");
}

void test_foreign(Random& random) {
  Format f;
  for (int i = 0; i < 20000; ++i) {
    std::vector<uint8_t> bytes(static_cast<size_t>(random.integer(0, 200)));
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.bits());
    if (i % 2 == 0 && bytes.size() >= 6) memcpy(bytes.data(), "SLMO\1", 6);
    EXPECT(read_copy(bytes, i % 8, &f) != nullptr, "random bytes were accepted");
  }
}

}  // namespace

void test_header() {
  Random random(1);
  for (int i = 0; i < 8; ++i) {
    Packed packed(random_format(random), random);
    const std::vector<uint8_t> good(packed.data.data(), packed.data.data() + packed.data.count());
    Format read;
    for (int64_t offset = 0; offset < 8; ++offset) {
      EXPECT(read_copy(good, offset, &read) == nullptr, "%s", describe(packed.format).c_str());
      EXPECT(memcmp(&read.n, &packed.format.n, sizeof(Format) - offsetof(Format, n)) == 0, "%s",
             describe(read).c_str());
    }
    test_every_byte(good);
    test_every_length(good);
    if (i == 0) test_forged(good, random);
  }
  test_foreign(random);
}

}  // namespace slmops::testing
