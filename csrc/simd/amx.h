// The matrix part of the SIMD contract on AMX: tdpbsud, 16 rows x 64 k of codes by 64 k x 16
// outputs of u8. no_matrix.h documents it.
//
// A line is a row of the second operand as it lies in memory: 4 k of 16 outputs.
#pragma once
#ifdef SLMOPS_AMX_EMULATION
#include SLMOPS_AMX_EMULATION
#else
#include <immintrin.h>
#endif

#include <cstdint>

#include "compiler.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// What ldtilecfg reads: bytes per row and rows of each tile register.
struct alignas(64) TileShapes {
  uint8_t palette;
  uint8_t zero[15];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

/// Ends with all stores in memory: g++'s intrinsics do not say that they read it.
inline void settle(const void* p) { SLMOPS_SETTLE(p); }

class Matrix {
 public:
  static constexpr int kRows = 16;

  explicit Matrix(int64_t unit) : step_(unit % 64 == 0 ? 64 : 32) {
    TileShapes shapes = {.palette = 1, .zero = {}, .row_bytes = {}, .rows = {}};
    for (int i = 0; i < 8; ++i) {  // sums 0 to 3, codes 4 and 5, lines 6 and 7
      shapes.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? step_ : 64);
      shapes.rows[i] = static_cast<uint8_t>(i >= 6 ? step_ / 4 : kRows);
    }
    settle(&shapes);
    _tile_loadconfig(&shapes);
  }
  ~Matrix() { _tile_release(); }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  template <int kBlocks>
  void dots(const int8_t* codes, int64_t stride, const uint8_t* lines, int64_t count,
            int32_t* out) const {
    constexpr int kHalf = 64, kRowBytes = 128;
    settle(out);
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kBlocks == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < count; k += step_, lines += step_ / 4 * kRowBytes) {
      _tile_loadd(6, lines, kRowBytes);
      _tile_loadd(7, lines + kHalf, kRowBytes);
      _tile_loadd(4, codes + k, stride);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      if constexpr (kBlocks == 2) {
        _tile_loadd(5, codes + kRows * stride + k, stride);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    }
    _tile_stored(0, out, kRowBytes);
    _tile_stored(1, out + 16, kRowBytes);
    if constexpr (kBlocks == 2) {
      _tile_stored(2, out + kRows * 32, kRowBytes);
      _tile_stored(3, out + kRows * 32 + 16, kRowBytes);
    }
  }

 private:
  int64_t step_;  // k of a multiplication
};

}  // namespace
}  // namespace slmops::SLMOPS_ISA
