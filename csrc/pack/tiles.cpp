// Packing and unpacking of tiles: plain [n][k] codes and scales to the lines of csrc/pack/format.h
// and back.
//
// A row's codes are contiguous in the plain tensor and 128 bytes apart in the lines, so both
// directions walk one row at a time over a piece of k whose lines stay in the first-level cache.
#include <cstring>

#include "format.h"

namespace slmops {
namespace {

constexpr int64_t kPieceK = 256;                // lines of a piece: 4 KiB (int4) or 8 KiB (int8)
constexpr int64_t kStepBytes = 2 * kLineBytes;  // from a row's lane to its next one
constexpr uint32_t kLowNibbles = 0x0f0f0f0fu;

/// The lane of output `row` (0..31) of a tile in the first line of its half.
constexpr int64_t lane_offset(int64_t row) { return row / 16 * kLineBytes + row % 16 * 4; }

/// k of one lane.
template <int kBits>
constexpr int64_t kLaneK = 32 / kBits;

template <int kBits>
uint32_t lane_of(const uint8_t* codes) {
  uint32_t lane;
  memcpy(&lane, codes, sizeof(lane));
  if constexpr (kBits == 4) {
    uint32_t high;
    memcpy(&high, codes + 4, sizeof(high));
    lane |= high << 4;
  }
  return lane;
}

template <int kBits>
void codes_of(uint32_t lane, uint8_t* codes) {
  if constexpr (kBits == 4) {
    const uint32_t high = (lane >> 4) & kLowNibbles;
    memcpy(codes + 4, &high, sizeof(high));
    lane &= kLowNibbles;
  }
  memcpy(codes, &lane, sizeof(lane));
}

/// Fills the lanes of one row for `length` k, of which the first `count` are in `codes`, the others
/// are `pad`.
template <int kBits>
void pack_row(const uint8_t* codes, int64_t count, int64_t length, uint8_t pad, uint8_t* lanes) {
  constexpr int64_t kStep = kLaneK<kBits>;
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep, lanes += kStepBytes) {
    const uint32_t lane = lane_of<kBits>(codes + k);
    memcpy(lanes, &lane, sizeof(lane));
  }
  uint8_t last[kStep];
  memset(last, pad, sizeof(last));
  const uint32_t padding = lane_of<kBits>(last);
  if (k < count) {
    memcpy(last, codes + k, static_cast<size_t>(count - k));
    const uint32_t lane = lane_of<kBits>(last);
    memcpy(lanes, &lane, sizeof(lane));
    k += kStep;
    lanes += kStepBytes;
  }
  for (; k < length; k += kStep, lanes += kStepBytes) memcpy(lanes, &padding, sizeof(padding));
}

/// The first `count` codes of one row's lanes.
template <int kBits>
void unpack_row(const uint8_t* lanes, int64_t count, uint8_t* codes) {
  constexpr int64_t kStep = kLaneK<kBits>;
  uint32_t lane;
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep, lanes += kStepBytes) {
    memcpy(&lane, lanes, sizeof(lane));
    codes_of<kBits>(lane, codes + k);
  }
  if (k < count) {
    uint8_t last[kStep];
    memcpy(&lane, lanes, sizeof(lane));
    codes_of<kBits>(lane, last);
    memcpy(codes + k, last, static_cast<size_t>(count - k));
  }
}

/// The code that pads k of output n in group g: its zero point, so that padding is worth 0, or 0
/// where that is no code.
uint8_t pad_code(const Format& f, const Parts& parts, int64_t n, int64_t g) {
  if (f.zero_kind == ZeroKind::none) return f.bits == 4 ? 8 : 128;
  if (f.zero_kind != ZeroKind::int16 || g >= groups_per_row(f)) return 0;
  return static_cast<uint8_t>(
      static_cast<const int16_t*>(parts.zero_point)[n * groups_per_row(f) + g]);
}

int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

/// Calls body(k begin, k end, byte offset in the tile of the first line, scale block) for every
/// piece of a tile.
template <typename Body>
void for_pieces(const Format& f, const Body& body) {
  const int64_t block = scale_block(f);
  for (int64_t b = 0; b * block < f.k_padded; ++b) {
    for (int64_t k = 0; k < block; k += kPieceK) {
      const int64_t end = k + kPieceK < block ? k + kPieceK : block;
      body(b * block + k, b * block + end, b * f.group_bytes + line_bytes(f, k), b);
    }
  }
}

template <int kBits>
void pack_codes(const Format& f, const Parts& parts, int64_t tile, uint8_t* out) {
  for_pieces(f, [&](int64_t begin, int64_t end, int64_t offset, int64_t block) {
    const int64_t count = clamp(f.k - begin, 0, end - begin);
    for (int64_t row = 0; row < kTile; ++row) {
      const int64_t n = tile * kTile + row;
      uint8_t* lanes = out + offset + lane_offset(row);
      if (n < f.n) {
        const uint8_t* codes = count > 0 ? parts.codes + n * f.k + begin : nullptr;
        pack_row<kBits>(codes, count, end - begin, pad_code(f, parts, n, block), lanes);
      } else {
        pack_row<kBits>(nullptr, 0, end - begin, 0, lanes);
      }
    }
  });
}

template <int kBits>
void unpack_codes(const Format& f, const uint8_t* packed, const Parts& parts, int64_t tile) {
  for_pieces(f, [&](int64_t begin, int64_t end, int64_t offset, int64_t) {
    const int64_t count = clamp(f.k - begin, 0, end - begin);
    if (count == 0) return;
    const int64_t outputs = clamp(f.n - tile * kTile, 0, kTile);
    for (int64_t row = 0; row < outputs; ++row) {
      uint8_t* codes = parts.codes + (tile * kTile + row) * f.k + begin;
      unpack_row<kBits>(packed + offset + lane_offset(row), count, codes);
    }
  });
}

/// 16-bit values [n][groups] of a tile, 64 bytes per group at `offset` of the group; absent ones
/// are 0.
void pack_halves(const Format& f, const void* values, int64_t tile, int64_t offset, uint8_t* out) {
  const int64_t groups = groups_per_row(f);
  for (int64_t g = 0; g * f.group < f.k_padded; ++g) {
    for (int64_t row = 0; row < kTile; ++row) {
      const int64_t n = tile * kTile + row;
      uint16_t half = 0;
      if (n < f.n && g < groups) half = static_cast<const uint16_t*>(values)[n * groups + g];
      memcpy(out + g * f.group_bytes + offset + 2 * row, &half, sizeof(half));
    }
  }
}

void unpack_halves(const Format& f, const uint8_t* packed, int64_t tile, int64_t offset,
                   void* values) {
  const int64_t groups = groups_per_row(f);
  const int64_t outputs = clamp(f.n - tile * kTile, 0, kTile);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t row = 0; row < outputs; ++row) {
      memcpy(static_cast<uint16_t*>(values) + (tile * kTile + row) * groups + g,
             packed + g * f.group_bytes + offset + 2 * row, sizeof(uint16_t));
    }
  }
}

/// Offset in a tile of sub-scale (row, j), j counted over the whole k; low nibble if j is even.
int64_t sub_offset(int64_t row, int64_t j) {
  return j / 4 * kSubBlockBytes + 16 * kLineBytes + 2 * row + j % 4 / 2;
}

void pack_sub_scales(const Format& f, const Parts& parts, int64_t tile, uint8_t* out) {
  const int64_t groups = groups_per_row(f);
  for (int64_t row = 0; row < kTile; ++row) {
    const int64_t n = tile * kTile + row;
    for (int64_t j = 0; j * kSubGroup < f.k_padded; j += 2) {
      uint8_t pair[2] = {0, 0};
      for (int64_t i = 0; i < 2; ++i) {
        if (n < f.n && j + i < groups) pair[i] = parts.sub_scale[n * groups + j + i];
      }
      out[sub_offset(row, j)] = static_cast<uint8_t>(pair[0] | pair[1] << 4);
    }
    float scale = 0;
    if (n < f.n) memcpy(&scale, static_cast<const float*>(parts.scale) + n, sizeof(scale));
    memcpy(out + f.tile_bytes - (kTile - row) * int64_t{sizeof(scale)}, &scale, sizeof(scale));
  }
}

void unpack_sub_scales(const Format& f, const uint8_t* packed, const Parts& parts, int64_t tile) {
  const int64_t groups = groups_per_row(f);
  const int64_t outputs = clamp(f.n - tile * kTile, 0, kTile);
  for (int64_t row = 0; row < outputs; ++row) {
    const int64_t n = tile * kTile + row;
    for (int64_t j = 0; j < groups; ++j) {
      parts.sub_scale[n * groups + j] = (packed[sub_offset(row, j)] >> (j % 2 * 4)) & 15;
    }
    memcpy(static_cast<float*>(parts.scale) + n,
           packed + f.tile_bytes - (kTile - row) * int64_t{sizeof(float)}, sizeof(float));
  }
}

}  // namespace

void pack_tiles(const Format& f, const Parts& parts, uint8_t* out, int64_t begin, int64_t end) {
  const int64_t scales = line_bytes(f, f.group);
  for (int64_t tile = begin; tile < end; ++tile) {
    uint8_t* dst = out + kHeaderBytes + tile * f.tile_bytes;
    if (f.bits == 4) {
      pack_codes<4>(f, parts, tile, dst);
    } else {
      pack_codes<8>(f, parts, tile, dst);
    }
    if (f.scale_kind == ScaleKind::sub16) {
      pack_sub_scales(f, parts, tile, dst);
      continue;
    }
    pack_halves(f, parts.scale, tile, scales, dst);
    if (f.zero_kind != ZeroKind::none) {
      pack_halves(f, parts.zero_point, tile, scales + 2 * kTile, dst);
    }
  }
}

void unpack_tiles(const Format& f, const uint8_t* packed, const Parts& parts, int64_t begin,
                  int64_t end) {
  const int64_t scales = line_bytes(f, f.group);
  for (int64_t tile = begin; tile < end; ++tile) {
    const uint8_t* src = packed + kHeaderBytes + tile * f.tile_bytes;
    if (f.bits == 4) {
      unpack_codes<4>(f, src, parts, tile);
    } else {
      unpack_codes<8>(f, src, parts, tile);
    }
    if (f.scale_kind == ScaleKind::sub16) {
      unpack_sub_scales(f, src, parts, tile);
      continue;
    }
    unpack_halves(f, src, tile, scales, parts.scale);
    if (f.zero_kind != ZeroKind::none) {
      unpack_halves(f, src, tile, scales + 2 * kTile, parts.zero_point);
    }
  }
}

}  // namespace slmops
