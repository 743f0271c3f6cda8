// A decoder layer, checked, and its phases:
//
//   h = x + factor * post_attention(output(attention(qkv(pre_attention(x)))))
//   y = h + factor * post_mlp(mlp(pre_mlp(h)))
//
// with every rounding of the ops that it is made of; each norm may be absent.
#pragma once
#include <optional>
#include <vector>

#include "attention.h"
#include "qkv_rotary.h"
#include "swiglu.h"

namespace slmops {

/// The tensors of a layer, in the order of the op's list; what a layer lacks is an empty tensor.
enum LayerPart : size_t {
  kPreAttentionNorm,
  kQkv,
  kQkvBias,
  kQueryNorm,
  kKeyNorm,
  kOutput,
  kOutputBias,
  kPostAttentionNorm,
  kPreMlpNorm,
  kGateUp,
  kGateUpBias,
  kDown,
  kDownBias,
  kPostMlpNorm,
  kLayerParts
};

/// What all layers of a call share.
struct LayerOptions {
  int64_t batch, length, k;  // of x
  DType type;                // of x
  int64_t heads[3];
  int64_t head_dim, hidden;
  Activation activation;
  double eps, offset;
  bool cast_before_weight;
  double qk_eps, qk_offset;
  float residual_multiplier;
  HeadsArgs angles;         // all but heads and norms
  AttentionArgs attention;  // of all positions; all but tensors and cut

  int64_t rows() const { return batch * length; }
};

/// A norm of the hidden state, or none.
struct HiddenNorm {
  HiddenNorm(const char* argument, const Tensor& weight, const LayerOptions& options);
  bool is_present() const { return owner.has_value(); }

  std::optional<Tensor> owner;
  NormWeight norm = {};
};

/// Keys or values of a layer: [batch][kv heads][slots][head_dim] of the type of x; keys in blocks
/// of 16 slots; or either as int8.
struct CacheView {
  void* data;
  int64_t batch_stride, head_stride, slot_stride;  // in elements
  HeadsLayout layout;
  Int8View int8 = {};
};

/// One layer; it may not move.
class DecoderLayer {
 public:
  /// `parts`: kLayerParts tensors. `keep`: how many positions of a sequence, its last ones, get a
  /// result; keys and values come from all.
  DecoderLayer(const Tensor* parts, const LayerOptions& options, const CacheView& keys,
               const CacheView& values, int64_t keep);
  DecoderLayer(const DecoderLayer&) = delete;
  DecoderLayer& operator=(const DecoderLayer&) = delete;

  /// Multiply-adds of a row.
  int64_t cost() const;
  /// Whether both can work in the same memory.
  bool is_like(const DecoderLayer& other) const;

  /// What layers that are alike work in.
  struct Memory {
    Memory(const DecoderLayer& layer, int64_t workers, Scratch* scratch);
    int64_t slab;
    uint8_t* normed;    // [slab][k], the input of qkv or of the MLP
    uint8_t* queries;   // [rows][heads][head_dim]
    uint8_t* attended;  // the same
    uint8_t* branch;    // [slab][k], what is added to the hidden state
    SlabActivations of_qkv, of_output, of_mlp;
    QkvScratch qkv;
    int64_t attention_queries;  // of a sequence, that `attention` is for
    AttentionScratch attention;
    MlpScratch mlp;
    WorkerScratch output;
  };
  /// Makes it work there; attention of fewer queries takes memory of its own.
  void use(const Memory& memory, int64_t workers, Scratch* scratch);

  /// The phases: `hidden` [batch][keep][k] = the layer of `x` [batch][length][k]; where all
  /// positions are kept they may be the same.
  void run(Worker* worker, const Memory& memory, const void* x, void* hidden) const;

 private:
  const AttentionScratch& attention_scratch(const Memory& memory) const {
    return own_attention_.has_value() ? *own_attention_ : memory.attention;
  }
  void run_to_attention(Worker* worker, const Memory& memory, const void* x) const;
  /// A phase: the positions of x that are kept.
  void copy_kept(Worker* worker, const void* x, void* hidden) const;
  void add_branch(const KernelTable& table, const HiddenNorm& norm, const void* x, void* hidden,
                  const Memory& memory, int64_t row, int64_t begin, int64_t end) const;
  void fill(const Worker& worker, const HiddenNorm& norm, const Format& f, const void* x,
            int64_t row, int64_t begin, int64_t end, const Memory& memory,
            const SlabActivations& out) const;

  const LayerOptions& options_;
  const Format qkv_format_, output_format_, gate_up_format_, down_format_;
  const Bias qkv_bias_, output_bias_, gate_up_bias_, down_bias_;
  const std::vector<float> ordered_gate_up_bias_;
  const HeadNorm query_norm_, key_norm_;
  const HiddenNorm pre_attention_, post_attention_, pre_mlp_, post_mlp_;
  const uint8_t* const packed_output_;
  Qkv qkv_;
  const GatedMlp mlp_;
  AttentionArgs attention_;
  std::optional<AttentionScratch> own_attention_;
};

}  // namespace slmops
