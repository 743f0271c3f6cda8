// libFuzzer on packed weights: whatever the bytes are, the reader refuses them or reads inside
// them, and what it reads can be packed again. The kernels that walk packed bytes get them too.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../../csrc/kernels/kernels.h"
#include "../../../csrc/pack/checksum.h"

#define REQUIRE(condition)                                                              \
  if (!(condition)) {                                                                   \
    std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
    std::abort();                                                                       \
  }

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most);

namespace slmops {
namespace scalar {
extern const KernelTable kernels;
}

namespace {

/// The parts of a weight, in blocks of exact size.
struct Plain {
  explicit Plain(const Format& f)
      : codes(size(f.n * f.k)),
        scale(f.scale_kind == ScaleKind::sub16 ? size(4 * f.n) : size(2 * f.n * groups_per_row(f))),
        zero_point(f.zero_kind == ZeroKind::none ? 0 : size(2 * f.n * groups_per_row(f))),
        sub_scale(f.scale_kind == ScaleKind::sub16 ? size(f.n * groups_per_row(f)) : 0) {}
  static size_t size(int64_t bytes) { return static_cast<size_t>(bytes); }
  Parts parts() { return {codes.data(), scale.data(), zero_point.data(), sub_scale.data()}; }
  bool operator==(const Plain&) const = default;
  std::vector<uint8_t> codes, scale, zero_point, sub_scale;
};

/// Whether integer zero points are codes, without which nothing is packed: they are what pads k.
bool has_codes_for_zero(const Format& f, const Plain& plain) {
  if (f.zero_kind != ZeroKind::int16) return true;
  for (size_t i = 0; i < plain.zero_point.size(); i += sizeof(int16_t)) {
    int16_t z;
    std::memcpy(&z, plain.zero_point.data() + i, sizeof(z));
    if (z < 0 || z >= 1 << f.bits) return false;
  }
  return true;
}

void read_again(const Format& f, const uint8_t* data, size_t size) {
  Plain first(f), second(f);
  unpack_tiles(f, data, first.parts(), 0, f.tiles);
  if (!has_codes_for_zero(f, first)) return;
  std::vector<uint8_t> packed(size);
  write_header(f, packed.data());
  REQUIRE(std::memcmp(packed.data(), data, kHeaderBytes) == 0);
  pack_tiles(f, first.parts(), packed.data(), 0, f.tiles);
  unpack_tiles(f, packed.data(), second.parts(), 0, f.tiles);
  REQUIRE(first == second);
}

void run_kernels(const Format& f, const uint8_t* data) {
  const KernelTable& kernels = scalar::kernels;
  const int64_t ids[] = {0, f.n - 1};
  std::vector<float> rows(static_cast<size_t>(2 * f.k)), x(static_cast<size_t>(f.k), 1.0f);
  kernels.embedding(f, data, ids, 2, DType::f32, rows.data());
  std::vector<int8_t> codes(static_cast<size_t>(f.k_padded));
  std::vector<float> scale(static_cast<size_t>(f.k_padded / f.act_group)), wide(codes.size());
  std::vector<int32_t> presets(static_cast<size_t>(presets_per_row(f)));
  std::vector<float> y(static_cast<size_t>(f.n));
  const QuantizedRows quantized = {codes.data(), scale.data(), presets.data(), nullptr};
  const SourceRows source = {x.data(), DType::f32, f.k, nullptr};
  kernels.quantize_rows(f, source, quantized, 0, 1);
  kernels.widen_rows(f, source, wide.data(), 0, 1);
  const size_t scratch_size = (static_cast<size_t>(scratch_bytes(f, 1)) + 63) / 64 * 64;
  uint8_t* scratch = static_cast<uint8_t*>(std::aligned_alloc(64, scratch_size + 64));
  const LinearArgs args = {.format = &f,
                           .packed = data,
                           .rows = quantized,
                           .x = wide.data(),
                           .bias = nullptr,
                           .bias_type = DType::f32,
                           .out = y.data(),
                           .out_type = DType::f32,
                           .out_stride = f.n,
                           .first_row = 0,
                           .first_output = 0,
                           .scratch = scratch};
  for (int64_t tile = 0; tile < f.tiles; ++tile) kernels.linear(args, tile, 0, 1);
  std::free(scratch);
}

/// Gives a header the magic number, the length and the checksum that it has to have: chance would
/// not find them.
size_t repair(uint8_t* data, size_t size, size_t most) {
  if (size < static_cast<size_t>(kHeaderBytes)) return size;
  Format f = {};
  f.bits = data[6];
  f.scale_kind = static_cast<ScaleKind>(data[7]);
  f.scale_type = static_cast<DType>(data[8]);
  f.zero_kind = static_cast<ZeroKind>(data[9]);
  f.activations = static_cast<Activations>(data[10]);
  int64_t sizes[5];
  std::memcpy(sizes, data + 16, sizeof(sizes));
  f.n = sizes[0], f.k = sizes[1], f.group = sizes[2], f.act_group = sizes[3];
  if (complete(&f) != nullptr) f.total_bytes = sizes[4];
  write_header(f, data);
  const size_t wanted = static_cast<size_t>(f.total_bytes);
  if (f.total_bytes < kHeaderBytes || wanted > most) return size;
  if (wanted > size) std::memset(data + size, 0x5a, wanted - size);
  return wanted;
}

/// A small valid weight to begin with.
size_t example(uint8_t* data, size_t most, unsigned int seed) {
  Format f = {};
  f.bits = seed % 2 == 0 ? 4 : 8;
  f.n = 1 + seed / 16 % 40;
  f.k = 1 + seed / 64 % 100;
  f.group = f.act_group = 32;
  f.scale_type = DType::f16;
  f.zero_kind = static_cast<ZeroKind>(seed / 4 % 4);
  f.activations = static_cast<Activations>(seed / 2 % 2);
  if (seed % 3 == 0) {
    f.bits = 4, f.scale_kind = ScaleKind::sub16, f.scale_type = DType::f32, f.group = kSubGroup;
    f.zero_kind = ZeroKind::none;
  }
  if (complete(&f) != nullptr || static_cast<size_t>(f.total_bytes) > most) return 0;
  std::memset(data, 0x3c, static_cast<size_t>(f.total_bytes));
  write_header(f, data);
  return static_cast<size_t>(f.total_bytes);
}

}  // namespace
}  // namespace slmops

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most,
                                          unsigned int seed) {
  if (seed % 64 == 0) {
    const size_t made = slmops::example(data, most, seed / 64);
    if (made != 0) return made;
  }
  size = LLVMFuzzerMutate(data, size, most);
  return seed % 8 == 1 ? size : slmops::repair(data, size, most);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace slmops;
  (void)chunk_checksum(data, size < kChecksumChunk ? size : kChecksumChunk);
  Format f;
  if (read_header(data, size, &f) != nullptr) return 0;
  REQUIRE(static_cast<size_t>(f.total_bytes) == size);
  REQUIRE(kHeaderBytes + f.tiles * f.tile_bytes == f.total_bytes);
  REQUIRE(f.k_padded >= f.k && f.tiles * kTile >= f.n);
  read_again(f, data, size);
  run_kernels(f, data);
  return 0;
}
