// The AMX intrinsics of csrc/simd/amx.h in plain C++, after Intel's descriptions; for tests only.
//
// It ends the program where the hardware would fault: a wrong shape, a tile used without a
// configuration. It also does so where a thread ends, or is configured again, with tiles in use.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

inline void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("AMX emulation: expected %s\n", what);
  std::abort();
}

/// A thread's tile registers.
struct Tiles {
  bool configured = false;
  struct Tile {
    int rows, row_bytes;
    uint8_t byte[16][64];
  } tile[8];

  ~Tiles() { expect(!configured, "tiles to be released before their thread ends"); }
  Tile& at(int i) {
    expect(configured, "a configuration before a tile is used");
    expect(tile[i].rows > 0, "a tile that the configuration has");
    return tile[i];
  }
};

inline Tiles& tiles() {
  static thread_local Tiles mine;
  return mine;
}

/// Rows and bytes as ldtilecfg takes them from its 64 bytes.
inline void configure(const uint8_t* bytes) {
  expect(!tiles().configured, "tiles to be released before the next configuration");
  expect(bytes[0] == 1 && bytes[1] == 0, "palette 1 and no restart row");
  for (int i = 2; i < 16; ++i) expect(bytes[i] == 0, "zeros in reserved bytes");
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof(row_bytes));
    const int rows = bytes[48 + i];
    expect((rows == 0) == (row_bytes == 0), "rows where there are bytes, and only there");
    expect(rows <= 16 && row_bytes <= 64, "at most 16 rows of 64 bytes");
    expect(i < 8 || rows == 0, "8 tiles");
    if (i < 8) tiles().tile[i] = {rows, row_bytes, {}};
  }
  tiles().configured = true;
}

inline void multiply(int to, int a, int b) {
  Tiles::Tile &c = tiles().at(to), &x = tiles().at(a), &y = tiles().at(b);
  expect(to != a && to != b && a != b, "three tiles");
  expect(c.rows == x.rows && c.row_bytes == y.row_bytes, "sums shaped as the product");
  expect(x.row_bytes == 4 * y.rows, "as many k in both operands");
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      uint32_t sum;
      std::memcpy(&sum, &c.byte[m][4 * n], sizeof(sum));
      for (int k = 0; k < x.row_bytes; ++k) {
        const int s8 = static_cast<int8_t>(x.byte[m][k]), u8 = y.byte[k / 4][4 * n + k % 4];
        sum += static_cast<uint32_t>(s8 * u8);
      }
      std::memcpy(&c.byte[m][4 * n], &sum, sizeof(sum));
    }
  }
}

}  // namespace amx_emulation

inline void _tile_loadconfig(const void* p) {
  amx_emulation::configure(static_cast<const uint8_t*>(p));
}
inline void _tile_release() {
  amx_emulation::expect(amx_emulation::tiles().configured, "tiles to release");
  amx_emulation::tiles().configured = false;
}
inline void _tile_zero(int i) {
  auto& tile = amx_emulation::tiles().at(i);
  std::memset(tile.byte, 0, sizeof(tile.byte));
}
inline void _tile_loadd(int i, const void* p, int64_t stride) {
  auto& tile = amx_emulation::tiles().at(i);
  std::memset(tile.byte, 0, sizeof(tile.byte));
  for (int row = 0; row < tile.rows; ++row) {
    std::memcpy(tile.byte[row], static_cast<const uint8_t*>(p) + row * stride,
                static_cast<size_t>(tile.row_bytes));
  }
}
inline void _tile_stored(int i, void* p, int64_t stride) {
  const auto& tile = amx_emulation::tiles().at(i);
  for (int row = 0; row < tile.rows; ++row) {
    std::memcpy(static_cast<uint8_t*>(p) + row * stride, tile.byte[row],
                static_cast<size_t>(tile.row_bytes));
  }
}
inline void _tile_dpbsud(int to, int a, int b) { amx_emulation::multiply(to, a, b); }
