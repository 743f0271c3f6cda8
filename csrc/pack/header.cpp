// The 64-byte header of packed weights: validation, sizes, reading and writing.
#include <cstring>

#include "format.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "headers are copied byte by byte");

namespace slmops {
namespace {

constexpr uint8_t kMagic[4] = {'S', 'L', 'M', 'O'};
constexpr uint16_t kVersion = 1;
// Far beyond any weight, and small enough that no product of two sizes and a line overflows.
constexpr int64_t kMaxDim = int64_t{1} << 40;
constexpr int64_t kMaxBytes = int64_t{1} << 60;

/// The header as it lies in memory; docs/packed-format.md has the same table.
struct RawHeader {
  uint8_t magic[4];
  uint16_t version;
  uint8_t bits, scale_kind, scale_type, zero_kind, activations;
  uint8_t reserved[5] = {};
  int64_t n, k, group, act_group, total_bytes;
  uint64_t checksum = 0;
};
static_assert(sizeof(RawHeader) == kHeaderBytes);
static_assert(offsetof(RawHeader, n) == 16 && offsetof(RawHeader, checksum) == 56);

uint64_t fnv1a(const uint8_t* data, size_t size) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (size_t i = 0; i < size; ++i) hash = (hash ^ data[i]) * 0x100000001b3u;
  return hash;
}

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int64_t lcm(int64_t a, int64_t b) {
  int64_t x = a, y = b;
  while (y != 0) {
    const int64_t rest = x % y;
    x = y;
    y = rest;
  }
  return a / x * b;
}

const char* check_kinds(const Format& f) {
  if (f.bits != 4 && f.bits != 8) return "expected bits 4 or 8";
  if (f.scale_kind > ScaleKind::sub16) return "expected scale kind 0 (group) or 1 (sub16)";
  if (f.scale_type > DType::f32) return "expected scale type 0 (f16), 1 (bf16) or 2 (f32)";
  if (f.zero_kind > ZeroKind::offset) {
    return "expected zero kind 0 (none), 1 (int16), 2 (floating) or 3 (offset)";
  }
  if (f.activations > Activations::float_fast) {
    return "expected activations 0 (int8), 1 (float) or 2 (float_fast)";
  }
  if (f.scale_kind == ScaleKind::group) {
    if (f.scale_type == DType::f32) return "scale kind group: expected scale type f16 or bf16";
    return nullptr;
  }
  if (f.bits != 4) return "scale kind sub16: expected bits 4";
  if (f.zero_kind != ZeroKind::none) return "scale kind sub16: expected no zero points";
  if (f.scale_type != DType::f32) return "scale kind sub16: expected scale type f32";
  return nullptr;
}

const char* check_sizes(const Format& f) {
  if (f.n < 1 || f.n > kMaxDim) return "expected n in 1..2^40";
  if (f.k < 1 || f.k > kMaxDim) return "expected k in 1..2^40";
  if (f.group > kMaxDim) return "expected a group of at most 2^40";
  if (f.scale_kind == ScaleKind::sub16) {
    if (f.group != kSubGroup) return "scale kind sub16: expected group 16";
  } else if (f.group < 32 || f.group % 32 != 0) {
    return "expected a group that is a positive multiple of 32";
  }
  const int64_t block = scale_block(f);
  const bool whole_k = f.act_group == round_up(f.k, block);
  if (f.act_group != 32 && f.act_group != 64 && f.act_group != 128 && !whole_k) {
    return "expected act_group 32, 64, 128 or the whole padded k";
  }
  if (f.act_group % f.group != 0 && f.group % f.act_group != 0) {
    return "expected act_group to be a multiple or a divisor of the group";
  }
  return nullptr;
}

/// |code| <= 127, and |u - z| (or u, or sub * (u - 8)) is at most 15, 255 or 120: the int32 sum of
/// a unit's products must not overflow.
const char* check_dots(const Format& f) {
  if (f.activations != Activations::int8) return nullptr;
  if (f.scale_kind == ScaleKind::sub16) {
    if (f.act_group > (1 << 17)) return "scale kind sub16: expected act_group of at most 131072";
    return nullptr;
  }
  const int64_t unit = f.group < f.act_group ? f.group : f.act_group;
  if (f.bits == 8 && unit > (1 << 16)) {
    return "bits 8: expected group or act_group of at most 65536";
  }
  if (f.bits == 4 && unit > (1 << 20)) {
    return "bits 4: expected group or act_group of at most 1048576";
  }
  return nullptr;
}

}  // namespace

const char* complete(Format* f) {
  if (const char* why = check_kinds(*f)) return why;
  if (const char* why = check_sizes(*f)) return why;
  if (const char* why = check_dots(*f)) return why;
  const int64_t block = scale_block(*f);
  f->k_padded = round_up(f->k, lcm(block, f->act_group));
  f->tiles = (f->n + kTile - 1) / kTile;
  if (f->scale_kind == ScaleKind::sub16) {
    f->group_bytes = kSubBlockBytes;
    f->tile_bytes = f->k_padded / block * kSubBlockBytes + kTile * int64_t{sizeof(float)};
  } else {
    const int64_t zero_bytes = f->zero_kind == ZeroKind::none ? 0 : 2 * kTile;
    f->group_bytes = line_bytes(*f, f->group) + 2 * kTile + zero_bytes;
    f->tile_bytes = f->k_padded / block * f->group_bytes;
  }
  if (f->tiles > kMaxBytes / f->tile_bytes) return "expected at most 2^60 packed bytes";
  f->total_bytes = kHeaderBytes + f->tiles * f->tile_bytes;
  return nullptr;
}

const char* read_header(const uint8_t* data, size_t size, Format* f) {
  RawHeader raw;
  if (size < sizeof(raw)) return "expected at least the 64 bytes of a header";
  memcpy(&raw, data, sizeof(raw));
  if (memcmp(raw.magic, kMagic, sizeof(kMagic)) != 0) {
    return "expected packed weights, which begin with the bytes SLMO";
  }
  if (raw.version != kVersion) {
    return "expected packed format version 1; pack the weights again with this version";
  }
  if (fnv1a(data, offsetof(RawHeader, checksum)) != raw.checksum) {
    return "the header does not match its checksum; the buffer is damaged";
  }
  for (const uint8_t byte : raw.reserved) {
    if (byte != 0) return "expected the reserved header bytes to be 0";
  }
  *f = {.bits = raw.bits,
        .scale_kind = static_cast<ScaleKind>(raw.scale_kind),
        .scale_type = static_cast<DType>(raw.scale_type),
        .zero_kind = static_cast<ZeroKind>(raw.zero_kind),
        .activations = static_cast<Activations>(raw.activations),
        .n = raw.n,
        .k = raw.k,
        .group = raw.group,
        .act_group = raw.act_group};
  if (const char* why = complete(f)) return why;
  if (raw.total_bytes != f->total_bytes) return "the header's length contradicts its sizes";
  if (size != static_cast<size_t>(f->total_bytes)) {
    return "the buffer's length is not the one in its header; it was cut or extended";
  }
  return nullptr;
}

void write_header(const Format& f, uint8_t* out) {
  RawHeader raw = {.magic = {kMagic[0], kMagic[1], kMagic[2], kMagic[3]},
                   .version = kVersion,
                   .bits = static_cast<uint8_t>(f.bits),
                   .scale_kind = static_cast<uint8_t>(f.scale_kind),
                   .scale_type = static_cast<uint8_t>(f.scale_type),
                   .zero_kind = static_cast<uint8_t>(f.zero_kind),
                   .activations = static_cast<uint8_t>(f.activations),
                   .n = f.n,
                   .k = f.k,
                   .group = f.group,
                   .act_group = f.act_group,
                   .total_bytes = f.total_bytes};
  memcpy(out, &raw, sizeof(raw));
  raw.checksum = fnv1a(out, offsetof(RawHeader, checksum));
  memcpy(out, &raw, sizeof(raw));
}

}  // namespace slmops
