// The phases of down(activation(gate(x)) * up(x)).
//
// The packed gate_up alternates tiles of gate and up. A unit is a span of columns of down's
// activation groups: its pairs of tiles go to fp32 scratch, from which its part of down's input is
// made. An activation group of all columns, or float activations, want h of whole rows first.
#pragma once
#include <vector>

#include "matmul.h"

namespace slmops {

/// A call, checked.
struct GatedMlp {
  const Format &gate_up, &down;
  const uint8_t *packed_gate_up, *packed_down;
  const float* gate_up_bias;  // in the order of the tiles, or null
  const void* down_bias;      // [n] of down_bias_type, or null
  DType down_bias_type;
  Activation activation;
  DType out_type;

  int64_t slab_rows() const;
};

/// Memory for slabs of up to `slab` rows.
struct MlpScratch {
  MlpScratch(const GatedMlp& p, int64_t slab, int64_t workers, Scratch* scratch);

  SlabActivations h;  // of down
  float* wide;        // h itself, where all of a row is wanted; else null
  WorkerScratch product, unit;
};

/// Two or three phases: out[rows][n], for a slab's activations x.
void run_mlp(Worker* worker, const GatedMlp& p, const SlabActivations& x, int64_t rows, void* out,
             const MlpScratch& scratch);

/// The bias of gate and up, [2 * hidden], in the order of the tiles, padded with 0; empty for none.
std::vector<float> tile_order(const Bias& bias, int64_t hidden, int64_t n);

}  // namespace slmops
