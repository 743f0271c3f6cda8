// attention: out = softmax(q k^T * scale + mask) v per query and query head, keys in splits of 256
// positions.
#include "attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "../isa/isa.h"
#include "int8_heads.h"
#include "matmul.h"

namespace slmops {
namespace {

constexpr char kOp[] = "attention";
constexpr int64_t kLargestHead = 256;
constexpr int64_t kLargestPosition = int64_t{1} << 53;
// Rows of an item: enough to make its copy of keys and values cheap (3 % of the products), few
// enough to stay with it in a second-level cache of 512 KiB.
constexpr int64_t kItemRows = 256;
// Items per worker below which the splits of the keys are shared out too.
constexpr int64_t kLeastItems = 4;

/// A checked [batch, length, heads, d] and the owner of what it points into.
struct Heads {
  Heads(const char* argument, const Tensor& t) : owner(t) {
    SLMOPS_CHECK(t.dim() == 4, kOp, ": expected ", argument,
                 " of shape (batch, length, heads, head_dim), got ", shape(t));
    const int64_t d = t.size(3);
    SLMOPS_CHECK(d >= 1 && d <= kLargestHead, kOp, ": expected ", argument,
                 " with a head_dim in 1..256, got ", d);
    if (d > 1 && t.stride(3) != 1) owner = torch::stable::contiguous(t);
    view = {.data = owner.const_data_ptr(),
            .type = float_type(kOp, argument, t.scalar_type()),
            .batch_stride = owner.stride(0),
            .length_stride = owner.stride(1),
            .head_stride = owner.stride(2)};
  }
  Tensor owner;
  HeadView view;
};

std::optional<Tensor> set_first_position(const std::optional<Tensor>& first, AttentionArgs* args) {
  if (!first.has_value()) return std::nullopt;
  check_type(kOp, "first_position", *first, ScalarType::Long);
  check_shape(kOp, "first_position", *first, {args->batch});
  Tensor owner = to_contiguous(*first);
  args->first_position = static_cast<const int64_t*>(owner.const_data_ptr());
  for (int64_t b = 0; b < args->batch; ++b) {
    const int64_t position = args->first_position[b];
    SLMOPS_CHECK(position >= -kLargestPosition && position <= kLargestPosition, kOp,
                 ": expected first_position in -2^53..2^53, got ", position);
  }
  return owner;
}

}  // namespace

std::optional<Tensor> set_mask(const char* op, const std::optional<Tensor>& mask,
                               AttentionArgs* args) {
  if (!mask.has_value()) return std::nullopt;
  const bool fits = mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == args->batch) &&
                    (mask->size(1) == 1 || mask->size(1) == args->heads) &&
                    mask->size(2) == args->queries && mask->size(3) == args->keys;
  SLMOPS_CHECK(fits, op, ": expected mask of shape (", args->batch, " or 1, ", args->heads,
               " or 1, ", args->queries, ", ", args->keys, "), got ", shape(*mask));
  args->mask_is_bool = mask->scalar_type() == ScalarType::Bool;
  if (!args->mask_is_bool) args->mask_type = float_type(op, "mask", mask->scalar_type());
  Tensor owner =
      mask->size(3) <= 1 || mask->stride(3) == 1 ? *mask : torch::stable::contiguous(*mask);
  args->mask = owner.const_data_ptr();
  args->mask_batch_stride = owner.size(0) == 1 ? 0 : owner.stride(0);
  args->mask_head_stride = owner.size(1) == 1 ? 0 : owner.stride(1);
  args->mask_query_stride = owner.stride(2);
  return owner;
}

AttentionScratch::AttentionScratch(const AttentionArgs& args, int64_t workers, Scratch* scratch) {
  const int64_t group = args.heads / args.kv_heads;
  block = std::max<int64_t>(1, std::min(args.queries, kItemRows / group));
  blocks = (args.queries + block - 1) / block;
  const int64_t items = args.batch * args.kv_heads * blocks;
  const bool apart = workers > 1 && items < kLeastItems * workers && args.keys > kSplit;
  splits = apart ? (args.keys + kSplit - 2) / kSplit + 1 : 0;
  const int64_t rows = args.batch * args.queries * args.heads;
  parts = apart ? scratch->take<float>(rows * splits * part_floats(args.dv)) : nullptr;
  AttentionArgs cut = args;
  apply(&cut);
  own = scratch->take_each(workers, attention_scratch_bytes(cut));
}

void AttentionScratch::apply(AttentionArgs* args) const {
  args->block = block;
  args->blocks = blocks;
  args->splits = splits;
  args->parts = parts;
}

void run_attention(Worker* worker, const AttentionArgs& args, const AttentionScratch& scratch) {
  const int64_t items = args.batch * args.kv_heads * args.blocks;
  worker->share(items * std::max<int64_t>(1, args.splits), [&](int64_t begin, int64_t end) {
    worker->table().attention(args, begin, end, scratch.own.of(worker->index()));
  });
}

void merge_splits(const KernelTable& table, const AttentionArgs& args, int64_t begin, int64_t end) {
  if (args.splits != 0) table.attention_merge(args, begin, end);
}

namespace {

/// k and v of args as they are, or as int8.
class KeysAndValues {
 public:
  KeysAndValues(const Tensor& q, const Tensor& k, const Tensor& v,
                const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale)
      : is_int8_(k_scale.has_value()) {
    SLMOPS_CHECK(v_scale.has_value() == is_int8_, kOp, ": expected both of k_scale and v_scale");
    const int64_t batch = q.size(0), d = q.size(3);
    if (is_int8_) {
      SLMOPS_CHECK(k_scale->dim() == 3, kOp, ": expected k_scale of shape (batch, heads, keys), ",
                   "got ", shape(*k_scale));
      kv_heads_ = k_scale->size(1);
      keys_ = k_scale->size(2);
      dv_ = d;
      k_int8_ = int8_view(kOp, "k", k, *k_scale, {batch, kv_heads_, d, keys_, false, false});
      v_int8_ = int8_view(kOp, "v", v, *v_scale, {batch, kv_heads_, d, keys_, true, false});
    } else {
      k_.emplace("k", k);
      v_.emplace("v", v);
      kv_heads_ = k.size(2);
      keys_ = k.size(1);
      dv_ = v.size(3);
      SLMOPS_CHECK(k.size(0) == batch && k.size(3) == d, kOp,
                   ": expected k with q's batch and head_dim, got q of shape ", shape(q),
                   " and k of shape ", shape(k));
      check_shape(kOp, "v", v, {batch, keys_, kv_heads_, dv_});
      check_type(kOp, "v", v, k.scalar_type());
    }
    const int64_t heads = q.size(2);
    SLMOPS_CHECK(kv_heads_ > 0 && heads % kv_heads_ == 0, kOp,
                 ": expected q's heads to be a multiple of k's, got ", heads, " and ", kv_heads_);
  }

  int64_t dv() const { return dv_; }
  void apply(AttentionArgs* args) const {
    args->is_int8 = is_int8_;
    if (is_int8_) {
      args->k_int8 = k_int8_;
      args->v_int8 = v_int8_;
    } else {
      args->k = k_->view;
      args->v = v_->view;
    }
    args->kv_heads = kv_heads_;
    args->keys = keys_;
    args->dv = dv_;
  }

 private:
  bool is_int8_;
  std::optional<Heads> k_, v_;
  Int8View k_int8_ = {}, v_int8_ = {};
  int64_t kv_heads_, keys_, dv_;
};

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v,
                 const std::optional<Tensor>& mask, const std::optional<Tensor>& first_position,
                 bool causal, int64_t window, double scale, double softcap,
                 const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  const Heads queries("q", q);
  const KeysAndValues both(q, k, v, k_scale, v_scale);
  SLMOPS_CHECK(window >= 0, kOp, ": expected a window of 0 (none) or more, got ", window);
  SLMOPS_CHECK(std::isfinite(scale), kOp, ": expected a finite scale, got ", scale);
  SLMOPS_CHECK(softcap >= 0 && std::isfinite(softcap), kOp,
               ": expected a softcap of 0 (none) or a positive number, got ", softcap);
  Tensor out = new_tensor({q.size(0), q.size(1), q.size(2), both.dv()}, q.scalar_type());
  AttentionArgs args = {};
  args.q = queries.view;
  args.batch = q.size(0);
  args.queries = q.size(1);
  args.heads = q.size(2);
  args.d = q.size(3);
  both.apply(&args);
  args.causal = causal;
  args.window = window;
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.read_ahead = tuned_read_ahead.load(std::memory_order_relaxed);
  args.block = 1;
  args.out = out.mutable_data_ptr();
  const std::optional<Tensor> seen = set_mask(kOp, mask, &args);
  const std::optional<Tensor> first = set_first_position(first_position, &args);
  if (out.numel() == 0) return out;
  const int64_t rows = args.batch * args.queries * args.heads;
  const int64_t workers =
      Team::size_for(rows * args.keys * (args.d + args.dv), args.batch * args.queries);
  Scratch scratch;
  const AttentionScratch own(args, workers, &scratch);
  own.apply(&args);
  Team::run(workers, [&](Worker& worker) {
    run_attention(&worker, args, own);
    worker.share(args.splits == 0 ? 0 : rows, [&](int64_t begin, int64_t end) {
      merge_splits(worker.table(), args, begin, end);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? first_position, bool causal, "
      "int window, float scale, float softcap=0.0, Tensor? k_scale=None, Tensor? v_scale=None) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }

}  // namespace slmops
