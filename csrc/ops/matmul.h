// What the ops on packed weights share: activations prepared once per slab of rows, and the cut of
// a slab's work into items.
//
// Neither slabs nor blocks of rows nor workers can change a result: an output depends on its own
// row and tile alone.
#pragma once
#include <algorithm>
#include <atomic>

#include "../isa/isa.h"
#include "check.h"
#include "scratch.h"
#include "team.h"

namespace slmops {

constexpr bool is_int8(const Format& f) { return f.activations == Activations::int8; }

constexpr bool is_fast(const Format& f) { return f.activations == Activations::float_fast; }

/// Scratch bytes of a row's activations, its scales, presets and sums left out.
constexpr int64_t row_bytes(const Format& f) {
  return f.k_padded * (is_int8(f) ? 1 + kCodeBlocks : is_fast(f) ? 6 : 4);
}

/// Rows of a slab: bounds the scratch of long prompts, which takes `row_bytes` a row.
int64_t slab_rows(int64_t row_bytes);

/// The activations of a slab as a packed weight's mode wants them.
struct SlabActivations {
  QuantizedRows quantized;  // int8
  float* wide;              // float and float_fast: [rows][k_padded]
  PairRows pairs;           // float_fast
};

SlabActivations take_activations(const Format& f, int64_t rows, Scratch* scratch);
/// Whether the weight's products are those of bf16 kernels, which read SlabActivations::pairs.
inline bool uses_pairs(const Worker& worker, const Format& f) {
  return is_fast(f) && worker.fast() != nullptr;
}
/// Quantizes, widens or rounds rows [begin, end) of `src` to the same rows of `out`.
void fill_rows(const Worker& worker, const Format& f, const SourceRows& src,
               const SlabActivations& out, int64_t begin, int64_t end);
/// A phase: rows [row, row + rows) of `src`, which become the slab's first.
void fill_activations(Worker* worker, const Format& f, const SourceRows& src, int64_t row,
                      int64_t rows, const SlabActivations& out);

/// Rows of `src` from `row` on.
inline SourceRows rows_from(SourceRows src, int64_t row) {
  src.x = static_cast<const uint8_t*>(src.x) + row * src.stride * size_of(src.type);
  return src;
}

/// LinearArgs::read_ahead and that of AttentionArgs, as torch_slmops.tuning set it.
inline std::atomic<int64_t> tuned_read_ahead{0};
constexpr int64_t kMostReadAhead = 1 << 20;

/// A weight with its activations and no bias, outputs in fp32; the caller sets what differs.
LinearArgs linear_args(const Format& f, const uint8_t* packed, const SlabActivations& x);

/// The product of a tile: KernelTable::linear, or what the CPU has in its place.
inline void run_tile(const Worker& worker, const LinearArgs& args, int64_t tile, int64_t first,
                     int64_t last) {
  if (uses_pairs(worker, *args.format)) return worker.fast()->linear(args, tile, first, last);
  worker.table().linear(args, tile, first, last);
}

/// A slab's work: `units` of outputs times blocks of `block` rows, small enough for a core's cache
/// and many enough for all workers.
struct Cut {
  Cut(int64_t units, int64_t rows, int64_t workers);
  int64_t items() const { return units * ((rows + block - 1) / block); }

  int64_t units, rows, block;
};
/// Rows of a block, at most, of a cut of `rows` rows.
int64_t most_block_rows(int64_t rows);

/// A phase: body(unit, first row, last row) for all units and blocks.
template <class Body>
void share_cut(Worker* worker, const Cut& cut, const Body& body) {
  worker->share(cut.items(), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / cut.units * cut.block;
      body(item % cut.units, first, std::min(first + cut.block, cut.rows));
    }
  });
}

/// A whole product of a slab: out[rows][n] of out_type = activations * weight + bias.
struct Product {
  const Format& f;
  const uint8_t* packed;
  const SlabActivations& x;
  int64_t rows;
  const void* bias;  // [n] of bias_type, or null
  DType bias_type;
  void* out;
  DType out_type;
  WorkerScratch scratch;  // product_bytes(f, rows)
};
int64_t product_bytes(const Format& f, int64_t rows);
/// A phase.
void run_product(Worker* worker, const Product& p);

/// The packed weight `packed` after checks that it has `n` outputs and as many inputs as x has
/// columns; `what` and `argument` name them in errors.
Format weight_format(const char* op, const char* argument, const Tensor& packed, int64_t n,
                     const char* what, const Tensor& x);

/// A 1-D bias of n elements, absent or present, and its owner.
struct Bias {
  Bias(const char* op, const char* argument, const std::optional<Tensor>& bias, int64_t n);
  const void* data() const { return owner ? owner->const_data_ptr() : nullptr; }

  std::optional<Tensor> owner;
  DType type = DType::f32;
};

/// The order of columns, absent or present, and its owner.
struct Permutation {
  Permutation(const char* op, const std::optional<Tensor>& perm, int64_t k);
  const int64_t* data() const {
    return owner ? static_cast<const int64_t*>(owner->const_data_ptr()) : nullptr;
  }

  std::optional<Tensor> owner;
};

}  // namespace slmops
