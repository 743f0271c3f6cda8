// The checks and phases of a decoder layer.
#include "decoder_layer.h"

#include <cstring>

namespace slmops {
namespace {

constexpr char kOp[] = "decoder_layers";

std::optional<Tensor> present(const Tensor& t) {
  return t.numel() > 0 ? std::optional<Tensor>(t) : std::nullopt;
}

/// The packed weight `packed` after checks that it is n x k.
Format format_of(const char* argument, const Tensor& packed, int64_t n, int64_t k) {
  const Format f = packed_format(kOp, packed);
  SLMOPS_CHECK(f.n == n && f.k == k, kOp, ": expected the packed weight ", argument, " to be ", n,
               " x ", k, ", got ", f.n, " x ", f.k);
  return f;
}

const uint8_t* bytes_of(const Tensor& packed) {
  return static_cast<const uint8_t*>(packed.const_data_ptr());
}

bool same_sizes(const Format& a, const Format& b) {
  return a.bits == b.bits && a.scale_kind == b.scale_kind && a.activations == b.activations &&
         a.n == b.n && a.k == b.k && a.group == b.group && a.act_group == b.act_group;
}

int64_t sum_of_heads(const LayerOptions& o) { return o.heads[0] + o.heads[1] + o.heads[2]; }

int64_t gate_up_rows(const LayerOptions& o) { return 2 * kTile * ((o.hidden + kTile - 1) / kTile); }

HeadsArgs heads_args(const LayerOptions& o, const HeadNorm& q, const HeadNorm& k,
                     const CacheView& keys, const CacheView& values) {
  HeadsArgs args = o.angles;
  for (int part = 0; part < 3; ++part) args.heads[part] = o.heads[part];
  args.d = o.head_dim;
  args.type = o.type;
  args.norm[0] = q.norm;
  args.norm[1] = k.norm;
  args.norm_width[0] = q.width;
  args.norm_width[1] = k.width;
  const int64_t first_key = o.attention.keys - o.length;
  const auto new_slots = [&](const CacheView& cache) -> HeadsOut {
    HeadsOut out = {cache.data,   cache.batch_stride, cache.slot_stride, cache.head_stride,
                    cache.layout, first_key,          cache.int8};
    if (cache.layout == HeadsLayout::plain) {
      out.data =
          static_cast<uint8_t*>(cache.data) + first_key * cache.slot_stride * size_of(o.type);
    }
    return out;
  };
  args.out[1] = new_slots(keys);
  args.out[2] = new_slots(values);
  return args;
}

/// Of rows [.][k] at x and out, which may be the same.
NormArgs norm_args(const HiddenNorm& norm, const LayerOptions& o, const void* x, void* out) {
  return {.norm = norm.norm,
          .x = x,
          .type = o.type,
          .stride = o.k,
          .out = out,
          .out_type = o.type,
          .k = o.k};
}

/// Attention of the last `count` queries alone, which the causal mask counts from the end.
AttentionArgs last_queries(AttentionArgs args, int64_t count) {
  if (args.mask != nullptr) {
    const int64_t size = args.mask_is_bool ? 1 : size_of(args.mask_type);
    args.mask = static_cast<const uint8_t*>(args.mask) +
                (args.queries - count) * args.mask_query_stride * size;
  }
  args.queries = count;
  return args;
}

HeadView view_of(const CacheView& cache, DType type) {
  return {cache.data, type, cache.batch_stride, cache.slot_stride, cache.head_stride};
}

}  // namespace

HiddenNorm::HiddenNorm(const char* argument, const Tensor& weight, const LayerOptions& options) {
  if (weight.numel() == 0) return;
  check_shape(kOp, argument, weight, {options.k});
  owner = to_contiguous(weight);
  norm = {.weight = owner->const_data_ptr(),
          .type = float_type(kOp, argument, weight.scalar_type()),
          .eps = static_cast<float>(options.eps),
          .offset = static_cast<float>(options.offset),
          .cast = options.cast_before_weight ? options.type : DType::f32};
}

DecoderLayer::DecoderLayer(const Tensor* parts, const LayerOptions& o, const CacheView& keys,
                           const CacheView& values, int64_t keep)
    : options_(o),
      qkv_format_(format_of("qkv", parts[kQkv], sum_of_heads(o) * o.head_dim, o.k)),
      output_format_(format_of("output", parts[kOutput], o.k, o.heads[0] * o.head_dim)),
      gate_up_format_(format_of("gate_up", parts[kGateUp], gate_up_rows(o), o.k)),
      down_format_(format_of("down", parts[kDown], o.k, o.hidden)),
      qkv_bias_(kOp, "qkv_bias", present(parts[kQkvBias]), qkv_format_.n),
      output_bias_(kOp, "output_bias", present(parts[kOutputBias]), o.k),
      gate_up_bias_(kOp, "gate_up_bias", present(parts[kGateUpBias]), 2 * o.hidden),
      down_bias_(kOp, "down_bias", present(parts[kDownBias]), o.k),
      ordered_gate_up_bias_(tile_order(gate_up_bias_, o.hidden, gate_up_format_.n)),
      query_norm_(kOp, "q_norm", present(parts[kQueryNorm]), o.heads[0], o.head_dim, o.qk_eps,
                  o.qk_offset),
      key_norm_(kOp, "k_norm", present(parts[kKeyNorm]), o.heads[1], o.head_dim, o.qk_eps,
                o.qk_offset),
      pre_attention_("pre_attention_norm", parts[kPreAttentionNorm], o),
      post_attention_("post_attention_norm", parts[kPostAttentionNorm], o),
      pre_mlp_("pre_mlp_norm", parts[kPreMlpNorm], o),
      post_mlp_("post_mlp_norm", parts[kPostMlpNorm], o),
      packed_output_(bytes_of(parts[kOutput])),
      qkv_{.f = qkv_format_,
           .packed = bytes_of(parts[kQkv]),
           .bias = qkv_bias_.data(),
           .bias_type = qkv_bias_.type,
           .heads = heads_args(o, query_norm_, key_norm_, keys, values)},
      mlp_{.gate_up = gate_up_format_,
           .down = down_format_,
           .packed_gate_up = bytes_of(parts[kGateUp]),
           .packed_down = bytes_of(parts[kDown]),
           .gate_up_bias = ordered_gate_up_bias_.empty() ? nullptr : ordered_gate_up_bias_.data(),
           .down_bias = down_bias_.data(),
           .down_bias_type = down_bias_.type,
           .activation = o.activation,
           .out_type = o.type},
      attention_(last_queries(o.attention, keep)) {
  attention_.k = view_of(keys, o.type);
  attention_.k_blocked = keys.layout == HeadsLayout::key_blocks;
  attention_.v = view_of(values, o.type);
  attention_.is_int8 = keys.layout == HeadsLayout::int8_keys;
  attention_.k_int8 = keys.int8;
  attention_.v_int8 = values.int8;
}

int64_t DecoderLayer::cost() const {
  return options_.k * (qkv_format_.n + output_format_.k + gate_up_format_.n + down_format_.k);
}

bool DecoderLayer::is_like(const DecoderLayer& other) const {
  return same_sizes(qkv_format_, other.qkv_format_) &&
         same_sizes(output_format_, other.output_format_) &&
         same_sizes(gate_up_format_, other.gate_up_format_) &&
         same_sizes(down_format_, other.down_format_) && qkv_.by_rows() == other.qkv_.by_rows();
}

DecoderLayer::Memory::Memory(const DecoderLayer& layer, int64_t workers, Scratch* scratch)
    : slab(std::min({layer.options_.rows(), layer.qkv_.slab_rows(), layer.mlp_.slab_rows()})),
      normed(scratch->take<uint8_t>(slab * layer.options_.k * size_of(layer.options_.type))),
      queries(scratch->take<uint8_t>(layer.options_.rows() * layer.output_format_.k *
                                     size_of(layer.options_.type))),
      attended(scratch->take<uint8_t>(layer.options_.rows() * layer.output_format_.k *
                                      size_of(layer.options_.type))),
      branch(scratch->take<uint8_t>(slab * layer.options_.k * size_of(layer.options_.type))),
      of_qkv(take_activations(layer.qkv_format_, slab, scratch)),
      of_output(take_activations(layer.output_format_, slab, scratch)),
      of_mlp(take_activations(layer.gate_up_format_, slab, scratch)),
      qkv(layer.qkv_, slab, workers, scratch),
      attention_queries(layer.attention_.queries),
      attention(layer.attention_, workers, scratch),
      mlp(layer.mlp_, slab, workers, scratch),
      output(scratch->take_each(workers, product_bytes(layer.output_format_, slab))) {}

void DecoderLayer::use(const Memory& memory, int64_t workers, Scratch* scratch) {
  const int64_t row = output_format_.k, length = options_.length;
  const int64_t strides[3] = {length * row, row, options_.head_dim};
  qkv_.heads.out[0] = {memory.queries, strides[0], strides[1], strides[2]};
  const int64_t first = (length - attention_.queries) * row * size_of(options_.type);
  attention_.q = {memory.queries + first, options_.type, strides[0], strides[1], strides[2]};
  attention_.out = memory.attended;
  if (attention_.queries != memory.attention_queries) {
    own_attention_.emplace(attention_, workers, scratch);
  }
  attention_scratch(memory).apply(&attention_);
}

void DecoderLayer::fill(const Worker& worker, const HiddenNorm& norm, const Format& f,
                        const void* x, int64_t row, int64_t begin, int64_t end,
                        const Memory& memory, const SlabActivations& out) const {
  const int64_t k = options_.k;
  SourceRows src = rows_from({x, options_.type, k, nullptr}, row);
  if (norm.is_present()) {
    worker.table().rms_norm(norm_args(norm, options_, src.x, memory.normed), begin, end);
    src.x = memory.normed;
  }
  fill_rows(worker, f, src, out, begin, end);
}

void DecoderLayer::add_branch(const KernelTable& table, const HiddenNorm& norm, const void* x,
                              void* hidden, const Memory& memory, int64_t row, int64_t begin,
                              int64_t end) const {
  const int64_t k = options_.k, from = row * k * size_of(options_.type);
  if (norm.is_present()) {
    table.rms_norm(norm_args(norm, options_, memory.branch, memory.branch), begin, end);
  }
  const SumArgs args = {.x = static_cast<const uint8_t*>(x) + from,
                        .branch = memory.branch,
                        .out = static_cast<uint8_t*>(hidden) + from,
                        .type = options_.type,
                        .factor = options_.residual_multiplier,
                        .k = k};
  table.add(args, begin, end);
}

void DecoderLayer::run_to_attention(Worker* worker, const Memory& memory, const void* x) const {
  const int64_t rows = options_.rows(), slab = memory.slab;
  for (int64_t row = 0; row < rows; row += slab) {
    const int64_t count = std::min(slab, rows - row);
    worker->share(count, [&](int64_t begin, int64_t end) {
      fill(*worker, pre_attention_, qkv_format_, x, row, begin, end, memory, memory.of_qkv);
    });
    run_qkv(worker, qkv_, memory.of_qkv, row, count, memory.qkv);
  }
  run_attention(worker, attention_, attention_scratch(memory));
}

void DecoderLayer::copy_kept(Worker* worker, const void* x, void* hidden) const {
  const int64_t bytes = options_.k * size_of(options_.type), keep = attention_.queries;
  worker->share(options_.batch * keep, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = (i / keep + 1) * options_.length - keep + i % keep;
      std::memcpy(static_cast<uint8_t*>(hidden) + i * bytes,
                  static_cast<const uint8_t*>(x) + from * bytes, static_cast<size_t>(bytes));
    }
  });
}

void DecoderLayer::run(Worker* worker, const Memory& memory, const void* x, void* hidden) const {
  run_to_attention(worker, memory, x);
  if (attention_.queries < options_.length) {
    copy_kept(worker, x, hidden);
    x = hidden;
  }
  const KernelTable& table = worker->table();
  const int64_t rows = options_.batch * attention_.queries;
  const int64_t slab = memory.slab, heads = options_.heads[0];
  const SourceRows attended = {memory.attended, options_.type, output_format_.k, nullptr};
  for (int64_t row = 0; row < rows; row += slab) {
    const int64_t count = std::min(slab, rows - row);
    worker->share(count, [&](int64_t begin, int64_t end) {
      merge_splits(table, attention_, (row + begin) * heads, (row + end) * heads);
      fill_rows(*worker, output_format_, rows_from(attended, row), memory.of_output, begin, end);
    });
    run_product(worker, {.f = output_format_,
                         .packed = packed_output_,
                         .x = memory.of_output,
                         .rows = count,
                         .bias = output_bias_.data(),
                         .bias_type = output_bias_.type,
                         .out = memory.branch,
                         .out_type = options_.type,
                         .scratch = memory.output});
    worker->share(count, [&](int64_t begin, int64_t end) {
      add_branch(table, post_attention_, x, hidden, memory, row, begin, end);
      fill(*worker, pre_mlp_, gate_up_format_, hidden, row, begin, end, memory, memory.of_mlp);
    });
    run_mlp(worker, mlp_, memory.of_mlp, count, memory.branch, memory.mlp);
    worker->share(count, [&](int64_t begin, int64_t end) {
      add_branch(table, post_mlp_, hidden, hidden, memory, row, begin, end);
    });
  }
}

}  // namespace slmops
