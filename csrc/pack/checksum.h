// A checksum of any bytes, as fast as memory: it finds damage, it is no protection from an
// attacker.
//
//   mix(h, w) = (rotl(h, 29) ^ w) * P                    modulo 2^64
//   a chunk of 2^20 bytes (the last may be shorter), in words of 8 bytes, little endian, zeros
//   after its end: word i goes into lane i mod 8, which starts at S + lane; then the lanes into
//   one: S all chunks, ascending, into one that starts at the number of bytes
//
// mix is a bijection of w for each h, so damage inside one word is always found.
#pragma once
#include <cstddef>
#include <cstdint>

namespace slmops {

constexpr size_t kChecksumChunk = size_t{1} << 20;

/// The checksum of one chunk of at most kChecksumChunk bytes.
uint64_t chunk_checksum(const uint8_t* data, size_t size);

/// The checksum of `size` bytes from those of their chunks, [ceil(size / kChecksumChunk)].
uint64_t combine_checksums(const uint64_t* chunks, size_t size);

}  // namespace slmops
