// The matrix part of the SIMD contract, for rows without a matrix unit. A row that has one
// documents nothing else: amx.h defines the same name.
#pragma once

namespace slmops::SLMOPS_ISA {
namespace {

/// Integer dots of blocks of kRows rows with a tile's 32 outputs; 0: the row has no such thing.
///
/// A Matrix lives while a thread uses the unit, and takes its registers for so long:
///   explicit Matrix(int64_t unit)  for dots of multiples of `unit` k, itself a multiple of 32
///   dots<kBlocks>(codes, stride, lines, count, out)
///     out[i][n] = sum over `count` k of codes[i * stride + k] * u[n][k], rows i of kBlocks (1 or
///     2) blocks, n of 32 outputs; lines: of int8, 4 k of outputs 0..15, of outputs 16..31, ...
struct Matrix {
  static constexpr int kRows = 0;
};

}  // namespace
}  // namespace slmops::SLMOPS_ISA
