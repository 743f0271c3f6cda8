// The packed weight format: one 64-byte header, then tiles of 32 outputs.
//
//   header | tile 0 | tile 1 | ...              tiles in order of n, 32 outputs each (the last
//   padded) tile   = groups in order of k; a group      = lines, 32 scales, 32 zero points if
//   stored   (scale kind `group`) tile   = blocks of 64 k, then 32 fp32 S;    a block = 16 lines,
//   64 bytes of sub-scales     (scale kind `sub16`) line   = 64 bytes = 16 outputs x 8 k (int4) or
//   x 4 k (int8): a 4-byte lane per output
//
// docs/packed-format.md has every offset. No torch, no STL: kernels and the sanitizer tests include
// this.
#pragma once
#include <cstddef>
#include <cstdint>

namespace slmops {

enum class DType : uint8_t { f16 = 0, bf16 = 1, f32 = 2 };
enum class ScaleKind : uint8_t { group = 0, sub16 = 1 };
/// What stands beside the scales: z of s * (u - z), or (offset) m of s * u + m.
enum class ZeroKind : uint8_t { none = 0, int16 = 1, floating = 2, offset = 3 };
enum class Activations : uint8_t { int8 = 0, floating = 1, float_fast = 2 };

constexpr int64_t kHeaderBytes = 64;
constexpr int64_t kTile = 32;       // outputs of a tile
constexpr int64_t kLineBytes = 64;  // 16 outputs, 4 bytes each
constexpr int64_t kSubGroup = 16;   // k that share a sub-scale
constexpr int64_t kSubBlock = 64;   // k of a sub16 block
constexpr int64_t kSubBlockBytes = 17 * kLineBytes;

/// What a header says, and what follows from it. Sizes in elements unless the name says bytes.
struct Format {
  int32_t bits;  // 4 or 8
  ScaleKind scale_kind;
  DType scale_type;  // f16 or bf16 for `group`, f32 for `sub16`
  ZeroKind zero_kind;
  Activations activations;
  int64_t n, k;       // of the weight, unpadded
  int64_t group;      // k that share a scale; 16 for `sub16`
  int64_t act_group;  // k that share an activation scale
  // derived
  int64_t k_padded = 0;  // k rounded up to lcm(group or 64, act_group)
  int64_t tiles = 0;     // ceil(n / 32)
  int64_t group_bytes =
      0;  // lines + scales + zero points of a group in a tile; `sub16`: of a 64-k block
  int64_t tile_bytes = 0;
  int64_t total_bytes = 0;  // header included
};

/// k after which scales repeat in a tile: the group, or a sub16 block.
constexpr int64_t scale_block(const Format& f) {
  return f.scale_kind == ScaleKind::sub16 ? kSubBlock : f.group;
}

/// Bytes of the lines that hold `k` inputs (a multiple of 8) of a tile.
constexpr int64_t line_bytes(const Format& f, int64_t k) { return k * kTile * f.bits / 8; }

/// Scales per output and kind: ceil(k / group), 16 for the sub-scales.
constexpr int64_t groups_per_row(const Format& f) { return (f.k + f.group - 1) / f.group; }

/// Fills the derived fields of `f` from the others, or returns why the combination is invalid
/// (static string).
const char* complete(Format* f);

/// Reads a header of `size` accessible bytes at any address. Null on success, else what is wrong
/// (static string). `size` must be the whole buffer: it has to equal the length that the header
/// implies.
const char* read_header(const uint8_t* data, size_t size, Format* f);

/// Writes the 64 header bytes of a completed format.
void write_header(const Format& f, uint8_t* out);

/// Plain tensors of a weight, all contiguous. Absent ones are null.
struct Parts {
  uint8_t* codes;      // [n][k] u, 0..15 or 0..255
  void* scale;         // group: [n][ceil(k/group)] of scale_type; sub16: [n] f32
  void* zero_point;    // [n][ceil(k/group)] int16, or scale_type when floating or an offset
  uint8_t* sub_scale;  // sub16: [n][ceil(k/16)], 0..15
};

/// Packs tiles [begin, end) of `parts` into `out`, the whole buffer (header not written here).
void pack_tiles(const Format& f, const Parts& parts, uint8_t* out, int64_t begin, int64_t end);

/// Inverse of pack_tiles for tiles [begin, end): fills `parts`; padding is dropped.
void unpack_tiles(const Format& f, const uint8_t* packed, const Parts& parts, int64_t begin,
                  int64_t end);

}  // namespace slmops
