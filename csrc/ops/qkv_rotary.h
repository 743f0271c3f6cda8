// The phases of q, k, v = x w^T + bias, then norm and rotary embedding of q and k.
//
// A unit is a few tiles that hold whole heads: its outputs go to fp32 scratch, from which its heads
// are finished. A norm over the whole width of q or k needs all of a row first.
#pragma once
#include <algorithm>
#include <optional>

#include "matmul.h"
#include "rotary_tables.h"

namespace slmops {

/// A call, checked.
struct Qkv {
  const Format& f;
  const uint8_t* packed;
  const void* bias;  // [n] of bias_type, or null
  DType bias_type;
  HeadsArgs heads;

  /// Whether a norm wants all of a row.
  bool by_rows() const { return std::max(heads.norm_width[0], heads.norm_width[1]) > heads.d; }
  int64_t slab_rows() const {
    return slmops::slab_rows(row_bytes(f) + (by_rows() ? f.n * int64_t{sizeof(float)} : 0));
  }
};

/// Memory for slabs of up to `slab` rows.
struct QkvScratch {
  QkvScratch(const Qkv& p, int64_t slab, int64_t workers, Scratch* scratch);

  WorkerScratch product, unit;
  float* rows;    // [slab][n], where a norm wants all of a row
  int64_t tiles;  // of a unit
};

/// One or two phases: heads of rows [row, row + rows), whose activations are x.
void run_qkv(Worker* worker, const Qkv& p, const SlabActivations& x, int64_t row, int64_t rows,
             const QkvScratch& scratch);

/// A norm of q or k: absent, over each head, or over all heads together.
struct HeadNorm {
  HeadNorm(const char* op, const char* argument, const std::optional<Tensor>& weight, int64_t heads,
           int64_t d, double eps, double offset);

  std::optional<Tensor> owner;
  NormWeight norm = {};
  int64_t width = 0;
};

}  // namespace slmops
