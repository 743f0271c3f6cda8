// The kernel table: every kernel of an ISA row behind one documented function pointer.
//
// Kernels never allocate, thread, throw or check: csrc/ops does. All kernels of all rows give the
// same bits.
#pragma once
#include "../pack/format.h"

namespace slmops {

/// Rows of activations, quantized per act_group, as `linear` of the same ISA row reads them.
struct QuantizedRows {
  int8_t* codes;     // [m][k_padded], in -127..127, padding 0
  float* scale;      // [m][k_padded / act_group]
  int32_t* presets;  // [m][presets_per_row(f)]: what the integer accumulators of a row start from
  int8_t* blocks;  // the codes once more, as kernels on blocks of rows read them: code_block_bytes
                   // of them, or null
};

#if defined(__aarch64__) || defined(_M_ARM64)
constexpr bool kCodeBlocks = true;
#else
constexpr bool kCodeBlocks = false;
#endif
/// Rows of such a block, and rows up to which no kernel makes one.
constexpr int64_t kCodeRows = 8, kFewRows = 4;
/// Bytes of QuantizedRows::blocks for `rows` rows; 0: null.
constexpr int64_t code_block_bytes(const Format& f, int64_t rows) {
  if (!kCodeBlocks || rows <= kFewRows) return 0;
  return (rows + kCodeRows - 1) / kCodeRows * kCodeRows * f.k_padded;
}

/// Rows of activations as bf16 dots read them.
struct PairRows {
  uint16_t* x;  // [m][k_padded] bf16, of each eight k 0, 2, 4, 6, 1, 3, 5, 7; padding +0
  float*
      sums;  // [m][k_padded / group], of x in each weight group; only with zero points or offsets
};

/// Where activations come from: m rows of k elements, row i at x + i * stride elements, columns
/// taken in the order of perm (k entries) when it is not null.
struct SourceRows {
  const void* x;
  DType type;
  int64_t stride;
  const int64_t* perm;
};

/// k that share one preset: a sub-scale's 16, else the shorter of weight group and activation
/// group.
constexpr int64_t preset_unit(const Format& f) {
  return f.scale_kind == ScaleKind::sub16 ? kSubGroup
                                          : (f.group < f.act_group ? f.group : f.act_group);
}

/// int32 of QuantizedRows::presets per row; `sub16` has one per activation group after those per
/// unit.
constexpr int64_t presets_per_row(const Format& f) {
  const int64_t units = f.k_padded / preset_unit(f);
  return f.scale_kind == ScaleKind::sub16 ? units + f.k_padded / f.act_group : units;
}

struct LinearArgs {
  const Format* format;
  const uint8_t* packed;  // whole buffer, header included
  QuantizedRows rows;     // int8 mode
  const float* x;         // float mode: [m][k_padded] fp32, padding +0
  PairRows pairs;         // what FastKernels::linear reads
  const void* bias;       // [n] of bias_type, or null
  DType bias_type;
  void* out;  // of out_type, row stride out_stride elements, beginning at the element of row
              // first_row and output first_output
  DType out_type;
  int64_t out_stride, first_row, first_output;
  uint8_t* scratch;        // scratch_bytes(format, rows of a call) of this thread, aligned to 64
  int64_t read_ahead = 0;  // how many bytes after those it reads a pass of few rows asks for more;
                           // 0: it does not
};

/// One weight row-block quantization job; definitions in docs/arithmetic.md, section "Choosing
/// codes".
struct QuantizeArgs {
  const void* w;  // [n][k] of type, row stride `stride` elements
  DType type;
  int64_t n, k, stride;
  int32_t bits;
  ScaleKind scale_kind;
  bool symmetric;
  bool mse;                 // search="mse", else "absmax"
  int64_t group;            // group kind: k per scale (any positive number); sub16: 16
  DType scale_type;         // f16 or bf16 (group), f32 (sub16)
  const float* importance;  // [k] or null
  Parts out;                // zero_point int16 when asymmetric
  float* scratch;           // quantize_scratch_floats(k, group) of this thread
};

/// The functions of simd/math.h that ops apply to elements; gelu_erf is the one that torch calls
/// gelu.
enum class Activation { silu, gelu_tanh, gelu_erf, relu2, sigmoid, exp, tanh };

/// What normalised values are multiplied by: offset + weight[i], or weight[i] where offset is 0.
struct NormWeight {
  const void* weight;  // [k] of type
  DType type;
  float eps;
  float offset;
  DType cast;  // what x / rms is rounded to before the product; f32: it is not
};

struct NormArgs {
  NormWeight norm;
  const void* x;  // [rows][k] of type, row stride `stride` elements
  DType type;
  int64_t stride;
  void* out;  // [rows][k] of out_type
  DType out_type;
  int64_t k;
};

struct AddNormArgs {
  NormArgs norm;
  const void* residual;  // like x
  int64_t residual_stride;
  void* sum;  // [rows][k] of the type of x
};

/// out = x + branch * factor, the product (where factor is not 1) and the sum rounded to `type`.
struct SumArgs {
  const void* x;       // [rows][k] of type; may be `out`
  const void* branch;  // [rows][k] of type
  void* out;
  DType type;
  float factor;
  int64_t k;
};

/// Heads to rotate: item (b * length + l) * heads + h. Strides in elements.
struct RotaryArgs {
  const void* x;  // [batch][length][heads][d] of type
  DType type;
  int64_t batch_stride, length_stride, head_stride;
  int64_t length, heads, d;
  const void* cos;  // [batch or 1][length][r] of angle_type, r even and at most d
  const void* sin;
  DType angle_type;
  int64_t angle_batch_stride;  // 0 where all of a batch share the angles
  int64_t r;
  bool interleaved;
  void* out;  // [batch][length][heads][d] of type
};

/// Slots of a block of keys: element e of slot s is at (s / 16 * d + e) * 16 + s % 16 elements from
/// a head's beginning. The lanes of q k^T are then keys without a transposition.
constexpr int64_t kKeyBlock = 16;
/// Elements of a head whose keys lie in blocks, at most.
constexpr int64_t kMostKeyElements = 256;

/// Elements of a head as int8, padded with 0 to whole vectors of codes.
constexpr int64_t padded_head(int64_t d) { return (d + 15) / 16 * 16; }

/// Keys or values as int8 codes with a scale per head and slot. With p = padded_head(d), a block of
/// 16 slots is 16 * p bytes code + 128, in lines of the integer dots:
///   keys:   [p / 4][16 slots][4]: 4 elements of each slot, whose dots are over elements
///   values: [4][p][4]: 4 slots of each element, whose dots are over slots
struct Int8View {
  uint8_t* codes;  // of slot 0 of the first head
  int64_t batch_stride, head_stride;
  float* scale;  // likewise; slots contiguous
  int64_t scale_batch_stride, scale_head_stride;
};

/// Heads [batch][length][heads][d] that become keys or values from slot `first_slot` on.
struct StoreArgs {
  const void* x;  // of type; strides in elements, d contiguous
  DType type;
  int64_t batch_stride, length_stride, head_stride;
  int64_t length, heads, d;
  Int8View out;
  bool values;
  int64_t first_slot;
};

/// How heads lie where they are written.
enum class HeadsLayout { plain, key_blocks, int8_keys, int8_values };

/// Where heads [batch][length][heads][d] are written: strides in elements, d contiguous; in blocks
/// of keys from slot `first_slot` on; or there as int8.
struct HeadsOut {
  void* data;
  int64_t batch_stride, length_stride, head_stride;
  HeadsLayout layout = HeadsLayout::plain;
  int64_t first_slot = 0;
  Int8View int8 = {};
};

/// The heads of q, k, v and what becomes of them after the projection.
struct HeadsArgs {
  int64_t heads[3];
  int64_t d;
  HeadsOut out[3];
  DType type;
  NormWeight norm[2];     // of q and k
  int64_t norm_width[2];  // d: each head on its own; heads * d: all together; 0: no norm
  int64_t length;         // row b * length + l is position l of sequence b
  const void* cos;        // [batch or 1][length][r] of angle_type; null: no rotary embedding
  const void* sin;
  DType angle_type;
  int64_t angle_batch_stride;
  int64_t r;
  bool interleaved;
};

/// What becomes of the gate and up projections: h = activation(gate) * up, the input of `down`.
struct GateArgs {
  const Format* down;
  Activation activation;
  QuantizedRows rows;  // of down, where it takes int8
  float* wide;         // [m][k_padded of down] where h itself is wanted; else null
};

/// Heads of a tensor [batch][length][heads][d]; strides in elements, d contiguous.
struct HeadView {
  const void* data;
  DType type;
  int64_t batch_stride, length_stride, head_stride;
};

/// Keys whose softmax is taken at once; a split begins at a multiple of it in token positions.
constexpr int64_t kSplit = 256;

/// softmax(q k^T * scale + mask) v. An item is a block of queries with all query heads of one key
/// head: item ((b * kv_heads + head) * blocks + block), times and plus the split where items are
/// one split each.
struct AttentionArgs {
  HeadView q;  // [batch][queries][heads][d]
  HeadView k;  // [batch][keys][kv_heads][d], or blocks of keys
  HeadView v;  // [batch][keys][kv_heads][dv]
  bool k_blocked;
  bool is_int8;  // instead of k and v; d and dv are then the same
  Int8View k_int8, v_int8;
  int64_t batch, queries, keys, heads, kv_heads, d, dv;
  const void* mask;  // bytes, 0 or 1, or mask_type, [.][.][queries][keys]; null: none
  bool mask_is_bool;
  DType mask_type;
  int64_t mask_batch_stride, mask_head_stride, mask_query_stride;  // in elements
  const int64_t* first_position;  // [batch]: token position of key 0; null: 0
  bool causal;
  int64_t window;         // 0: none
  float scale, softcap;   // softcap 0: none
  int64_t block, blocks;  // queries of an item, items of a key head
  int64_t splits;         // 0: an item takes all splits; else as many items, each with one
  float* parts;           // [batch][queries][heads][splits][part_floats(dv)] where splits is not 0
  void* out;              // [batch][queries][heads][dv] of the type of q
  int64_t read_ahead;     // as that of LinearArgs, for keys and values; 0: what is usual
};

/// Floats of a softmax over a part of the keys: max, sum, padding, weighted sum of v in whole
/// vectors.
constexpr int64_t part_floats(int64_t dv) { return 16 + (dv + 15) / 16 * 16; }

struct KernelTable {
  /// codes, scale, presets of rows [begin, end) of the activations.
  void (*quantize_rows)(const Format& f, const SourceRows& src, const QuantizedRows& out,
                        int64_t begin, int64_t end);
  /// The same rows as fp32, padded with +0: the input of `activations="float"`.
  void (*widen_rows)(const Format& f, const SourceRows& src, float* out, int64_t begin,
                     int64_t end);
  /// out[m][n] = x[m][k] * w[n][k] + bias for rows [row_begin, row_end) and the 32 outputs of
  /// `tile`; more than kFewRows rows begin at a multiple of kCodeRows.
  void (*linear)(const LinearArgs& args, int64_t tile, int64_t row_begin, int64_t row_end);
  /// out[i][k] = w[ids[i]][k], rounded once to `type`; ids checked by the caller.
  void (*embedding)(const Format& f, const uint8_t* packed, const int64_t* ids, int64_t count,
                    DType type, void* out);
  /// out[i][n] = w[n][i] for i below k and the 32 outputs of `tile`, the values of `embedding`;
  /// row stride `stride` elements.
  void (*expand)(const Format& f, const uint8_t* packed, int64_t tile, DType type, void* out,
                 int64_t stride);
  /// Codes and scales of weight rows [16 * begin, 16 * end). Returns the smallest and largest
  /// non-zero |scale| (fp32, before rounding) through `range` when it is not null.
  void (*quantize_weight)(const QuantizeArgs& args, int64_t begin, int64_t end, float* range);
  /// Rows [begin, end) of x / sqrt(mean(x^2) + eps) * (offset + weight).
  void (*rms_norm)(const NormArgs& args, int64_t begin, int64_t end);
  /// The same of sum = x + residual, which is rounded to the type of x and kept.
  void (*add_rms_norm)(const AddNormArgs& args, int64_t begin, int64_t end);
  /// Rows [begin, end) of args.
  void (*add)(const SumArgs& args, int64_t begin, int64_t end);
  /// Items [begin, end) of x, turned by their positions' angles.
  void (*rotary)(const RotaryArgs& args, int64_t begin, int64_t end);
  /// Norm, rotary embedding and the one rounding of heads [head, head + count) of q, k, v, in this
  /// order, for rows [row, row + rows). x: fp32 [rows], row stride `stride`, overwritten; begins
  /// with the first head. A norm of more than a head needs all of its heads.
  void (*heads)(const HeadsArgs& args, float* x, int64_t stride, int64_t row, int64_t rows,
                int64_t head, int64_t count);
  /// h of columns [column, column + columns) of rows [row, row + rows), whole activation groups of
  /// down (and 64 k of sub16), into args. x: fp32 [rows][2 * columns], overwritten: 32 of the gate,
  /// 32 of up, alternating, of which `given` columns are there; the others are 0.
  void (*gate)(const GateArgs& args, float* x, int64_t row, int64_t rows, int64_t column,
               int64_t columns, int64_t given);
  /// Items [begin, end) of x, (b * length + l) * heads + h, as int8.
  void (*store_int8)(const StoreArgs& args, int64_t begin, int64_t end);
  /// Items [begin, end) of args, into `out` or, where they are single splits, into `parts`.
  /// scratch: attention_scratch_bytes(args) of this thread, aligned to 64.
  void (*attention)(const AttentionArgs& args, int64_t begin, int64_t end, uint8_t* scratch);
  /// Rows [begin, end) of `out`, [batch][queries][heads], from the splits in `parts`.
  void (*attention_merge)(const AttentionArgs& args, int64_t begin, int64_t end);
  /// y[i] = a(x[i]); for tests of the functions.
  void (*activation)(Activation a, const float* x, float* y, int64_t count);
  /// count elements fp32 <-> `type`, the project's one rounding; for tests of the conversions.
  void (*convert)(const void* in, DType in_type, void* out, DType out_type, int64_t count);
};

/// What a CPU with dots of bf16 has for `activations="float_fast"`. Not under the promise of bits.
struct FastKernels {
  /// Rows [begin, end) of the activations, rounded to bf16.
  void (*round_rows)(const Format& f, const SourceRows& src, const PairRows& out, int64_t begin,
                     int64_t end);
  /// As KernelTable::linear, from LinearArgs::pairs.
  void (*linear)(const LinearArgs& args, int64_t tile, int64_t row_begin, int64_t row_end);
};

/// k of the chunks that `linear` walks a tile in: whole activation groups and scale blocks whose
/// lines, or what they are expanded to, are about half of a first-level cache of 32 KiB; of 64 KiB
/// where kernels work on blocks of rows.
constexpr int64_t chunk_length(const Format& f) {
  const bool in_place = f.scale_kind == ScaleKind::group && f.bits == 4;
  const int64_t about = kCodeBlocks || in_place ? 1024 : 512;
  const int64_t block = scale_block(f) > f.act_group ? scale_block(f) : f.act_group;
  return block >= about ? block : about / block * block;
}
/// The same with activations that are not rounded, of the chunks whose weights are expanded to fp32
/// for more than a few rows; only groups that are not too long for it.
constexpr int64_t float_chunk_length(const Format& f) {
  constexpr int64_t kAbout = 128;
  return scale_block(f) >= kAbout ? scale_block(f) : kAbout / scale_block(f) * scale_block(f);
}
/// Whether those of `rows` rows are.
constexpr bool expands_floats(const Format& f, int64_t rows) {
  constexpr int64_t kRows = 12, kMostGroup = 1024;
  return rows >= kRows && f.activations != Activations::int8 && scale_block(f) <= kMostGroup;
}
/// Rows from which an ISA row with a matrix unit may use it, up to how many at a time, and the
/// integer sums that it makes of each before they are used.
constexpr int64_t kMatrixRows = 16, kMostMatrixRows = 32, kMostMatrixUnits = 32;
/// k whose integer sums a matrix unit makes before they are used: whole activation groups, about
/// 256, so that the sums of 32 rows by groups of 32 are 32 KiB.
constexpr int64_t matrix_span(const Format& f) {
  constexpr int64_t kAbout = 256;
  const int64_t span = f.act_group >= kAbout ? f.act_group : kAbout / f.act_group * f.act_group;
  return span < f.k_padded ? span : f.k_padded;
}
/// k that share one integer sum where a matrix unit makes it.
constexpr int64_t matrix_unit(const Format& f) {
  return f.scale_kind == ScaleKind::sub16 ? f.act_group : preset_unit(f);
}
/// Whether a matrix unit may be used. Not for many groups of weights in one of activations: all
/// their sums would have to wait for it.
constexpr bool fits_matrix(const Format& f, int64_t rows) {
  return rows >= kMatrixRows && f.activations == Activations::int8 &&
         matrix_span(f) / matrix_unit(f) <= kMostMatrixUnits;
}
/// Bytes per k of a chunk that blocks of 8 rows take beside its operands: for each 32 k three
/// vectors of 32 lanes and two of 64.
constexpr int64_t kBlockBytesPerK = (3 * 32 + 2 * 64) * 4 / 32;
/// Bytes of LinearArgs::scratch for blocks of `rows` rows: their sums; a chunk of lines expanded to
/// int8 or fp32; for a matrix unit the integer sums of a span.
constexpr int64_t scratch_bytes(const Format& f, int64_t rows) {
  int64_t bytes = rows * kTile * int64_t{sizeof(float)};
  const bool matrix = fits_matrix(f, rows);
  if (f.activations == Activations::int8) {
    const int64_t length = chunk_length(f);
    bytes += (length < f.k_padded ? length : f.k_padded) * (kTile + kBlockBytesPerK);
  }
  if (expands_floats(f, rows)) {  // weights, and scales of groups of 32 and longer
    bytes += float_chunk_length(f) * 33 / 32 * kTile * int64_t{sizeof(float)};
  }
  if (!matrix) return bytes;
  return bytes +
         matrix_span(f) / matrix_unit(f) * kMostMatrixRows * kTile * int64_t{sizeof(int32_t)};
}
/// Floats of QuantizeArgs::scratch: 16 transposed weight rows, once more normalised, and their
/// groups' scales.
constexpr int64_t quantize_scratch_floats(int64_t k, int64_t group) {
  return 16 * (2 * k + (k + group - 1) / group);
}

/// Query rows that attention computes at a time, at most.
constexpr int64_t kQueryRows = 8;
/// Floats of a row of scores: those of a split, and what blocks of keys reach beyond it.
constexpr int64_t kScoreStride = kSplit + 2 * kKeyBlock;
/// Bytes of a row of query codes.
constexpr int64_t kCodeStride = kMostKeyElements;
/// Bytes of attention's scratch for int8: codes of queries with a factor and a preset each, scales
/// of a split's keys and values, codes of p, two bytes each, with a factor and two presets a row.
constexpr int64_t int8_scratch_bytes(int64_t rows) {
  constexpr int64_t kFloat = sizeof(float);
  return rows * (kCodeStride + 2 * kFloat) + 2 * kScoreStride * kFloat +
         kQueryRows * (2 * kScoreStride + 3 * kFloat);
}
/// Bytes of attention's scratch: queries, their state, a split of keys and of values, scores.
constexpr int64_t attention_scratch_bytes(const AttentionArgs& args) {
  const int64_t group = args.kv_heads == 0 ? 0 : args.heads / args.kv_heads;
  const int64_t rows = (args.block * group + kQueryRows - 1) / kQueryRows * kQueryRows;
  const int64_t part = part_floats(args.dv);
  const int64_t floats = rows * (args.d + part) + (kSplit + kKeyBlock) * args.d + kSplit * part +
                         kQueryRows * (kScoreStride + part);
  return floats * int64_t{sizeof(float)} + rows * 2 * int64_t{sizeof(int64_t)} +
         (args.is_int8 ? int8_scratch_bytes(rows) : 0);
}

}  // namespace slmops
