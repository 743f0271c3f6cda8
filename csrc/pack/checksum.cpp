// The checksum of checksum.h.
#include "checksum.h"

#include <bit>
#include <cstring>

namespace slmops {
namespace {

static_assert(std::endian::native == std::endian::little, "words are read as they lie in memory");

constexpr uint64_t kStart = 0x9ae16a3b2f90404f, kFactor = 0xd6e8feb86659fd93;
constexpr size_t kLanes = 8, kBlock = kLanes * sizeof(uint64_t);

constexpr uint64_t mix(uint64_t hash, uint64_t word) {
  return (std::rotl(hash, 29) ^ word) * kFactor;
}

void mix_block(uint64_t* lanes, const uint8_t* block) {
  uint64_t words[kLanes];
  memcpy(words, block, kBlock);
  for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] = mix(lanes[lane], words[lane]);
}

}  // namespace

uint64_t chunk_checksum(const uint8_t* data, size_t size) {
  uint64_t lanes[kLanes];
  for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] = kStart + lane;
  const size_t whole = size / kBlock * kBlock;
  for (size_t at = 0; at < whole; at += kBlock) mix_block(lanes, data + at);
  const size_t rest = size - whole;
  if (rest > 0) {
    uint8_t block[kBlock] = {};
    memcpy(block, data + whole, rest);
    // Lanes whose word lies past the end take no part.
    uint64_t last[kLanes];
    memcpy(last, lanes, sizeof(last));
    mix_block(last, block);
    memcpy(lanes, last, (rest + 7) / 8 * sizeof(uint64_t));
  }
  uint64_t hash = kStart;
  for (const uint64_t lane : lanes) hash = mix(hash, lane);
  return hash;
}

uint64_t combine_checksums(const uint64_t* chunks, size_t size) {
  uint64_t hash = size;
  for (size_t i = 0; i < (size + kChecksumChunk - 1) / kChecksumChunk; ++i) {
    hash = mix(hash, chunks[i]);
  }
  return hash;
}

}  // namespace slmops
