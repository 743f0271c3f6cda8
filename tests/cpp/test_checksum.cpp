// A checksum reads its bytes and no others, wherever they lie, and tells every changed byte.
#include <algorithm>

#include "../../csrc/pack/checksum.h"
#include "testing.h"

namespace slmops::testing {
namespace {

uint64_t checksum(const uint8_t* data, size_t size) {
  std::vector<uint64_t> chunks((size + kChecksumChunk - 1) / kChecksumChunk);
  for (size_t i = 0; i < chunks.size(); ++i) {
    const size_t at = i * kChecksumChunk;
    chunks[i] = chunk_checksum(data + at, std::min(kChecksumChunk, size - at));
  }
  return combine_checksums(chunks.data(), size);
}

}  // namespace

void test_checksum() {
  Random random(7);
  for (int64_t size : {0, 1, 7, 8, 63, 64, 65, 200, (1 << 20) - 1, 1 << 20, (1 << 20) + 9}) {
    Block<uint8_t> block(size, 0), moved(size, 3);
    for (int64_t i = 0; i < size; ++i) {
      block[i] = moved[i] = static_cast<uint8_t>(random.integer(0, 255));
    }
    const size_t bytes = static_cast<size_t>(size);
    const uint64_t whole = checksum(block.data(), bytes);
    EXPECT(checksum(moved.data(), bytes) == whole, "%zu bytes elsewhere", bytes);
    for (int64_t i = 0; i < std::min<int64_t>(size, 300); ++i) {
      const int64_t at = i % 2 == 0 ? i : size - 1 - i / 2;
      const uint8_t flip = static_cast<uint8_t>(random.integer(1, 255));
      block[at] ^= flip;
      EXPECT(checksum(block.data(), bytes) != whole, "byte %d of %zu", static_cast<int>(at), bytes);
      block[at] ^= flip;
    }
    if (size > 1) EXPECT(checksum(block.data(), bytes - 1) != whole, "%zu bytes, cut", bytes);
  }
}

}  // namespace slmops::testing
