// decoder_layers: a run of decoder layers in one parallel region; their keys and values go into a
// cache.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <deque>

#include "decoder_layer.h"
#include "int8_heads.h"
#include "kept.h"
#include "text.h"

namespace slmops {
namespace {

constexpr char kOp[] = "decoder_layers";
constexpr char kKeys[] = "keys";
constexpr int64_t kLargestPosition = int64_t{1} << 53;

/// The number of keys that were there before, from a tensor of one element.
int64_t keys_before(const Tensor& start) {
  check_type(kOp, "start", start, ScalarType::Long);
  SLMOPS_CHECK(start.numel() == 1, kOp, ": expected start of one element, got shape ",
               shape(start));
  return *static_cast<const int64_t*>(start.const_data_ptr());
}

/// The token position of slot 0 of each sequence, from those of its queries.
std::vector<int64_t> first_positions(const std::optional<Tensor>& position_ids,
                                     const LayerOptions& o) {
  std::vector<int64_t> first;
  if (!position_ids.has_value()) return first;
  check_type(kOp, "position_ids", *position_ids, ScalarType::Long);
  SLMOPS_CHECK(position_ids->dim() == 2 &&
                   (position_ids->size(0) == 1 || position_ids->size(0) == o.batch) &&
                   position_ids->size(1) == o.length,
               kOp, ": expected position_ids of shape (", o.batch, " or 1, ", o.length, "), got ",
               shape(*position_ids));
  const Tensor owner = to_contiguous(*position_ids);
  const int64_t* ids = static_cast<const int64_t*>(owner.const_data_ptr());
  for (int64_t b = 0; b < o.batch; ++b) {
    const int64_t row = owner.size(0) == 1 ? 0 : b;
    const int64_t last = ids[(row + 1) * o.length - 1];
    SLMOPS_CHECK(last >= -kLargestPosition && last <= kLargestPosition, kOp,
                 ": expected position_ids in -2^53..2^53, got ", last);
    first.push_back(last - (o.attention.keys - 1));
  }
  return first;
}

/// Values, or keys that lie as they do: [batch, heads, slots, head_dim].
CacheView plain_cache(const char* argument, const Tensor& t, const LayerOptions& o) {
  SLMOPS_CHECK(t.dim() == 4 && t.size(0) == o.batch && t.size(1) == o.heads[1] &&
                   t.size(2) >= o.attention.keys && t.size(3) == o.head_dim && t.stride(3) == 1,
               kOp, ": expected ", argument, " of shape (", o.batch, ", ", o.heads[1],
               ", at least ", o.attention.keys, ", ", o.head_dim,
               "), its last dimension contiguous, got ", shape(t));
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2), HeadsLayout::plain};
}

/// Keys in blocks of 16 slots: [batch, heads, blocks, head_dim, 16].
CacheView blocked_cache(const Tensor& t, const LayerOptions& o) {
  const int64_t block = o.head_dim * kKeyBlock;
  SLMOPS_CHECK(t.size(0) == o.batch && t.size(1) == o.heads[1] &&
                   t.size(2) * kKeyBlock >= o.attention.keys && t.size(3) == o.head_dim &&
                   t.size(4) == kKeyBlock && t.stride(2) == block && t.stride(3) == kKeyBlock &&
                   t.stride(4) == 1,
               kOp, ": expected blocks of keys of shape (", o.batch, ", ", o.heads[1],
               ", at least ", (o.attention.keys + kKeyBlock - 1) / kKeyBlock, ", ", o.head_dim,
               ", ", kKeyBlock, "), those of a head contiguous, got ", shape(t));
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), 0, HeadsLayout::key_blocks};
}

CacheView cache_view(const char* argument, const Tensor& t, const LayerOptions& o) {
  SLMOPS_CHECK(t.scalar_type() == scalar_type(o.type), kOp, ": expected ", argument,
               " of the dtype of x, ", name(scalar_type(o.type)), ", got ", name(t.scalar_type()));
  const bool blocked = argument == kKeys && t.dim() == 5;
  return blocked ? blocked_cache(t, o) : plain_cache(argument, t, o);
}

/// Both of layer `layer`, of `parts` tensors each: keys, values, and for int8 their scales.
struct LayerCache {
  CacheView keys, values;
};
LayerCache layer_cache(const TensorList& cache, size_t parts, size_t layer, const LayerOptions& o) {
  const Tensor* tensors = &cache[parts * layer];
  if (parts == 2) {
    return {cache_view(kKeys, tensors[0], o), cache_view("values", tensors[1], o)};
  }
  const auto view = [&](const char* argument, int i, HeadsLayout layout) {
    const bool values = layout == HeadsLayout::int8_values;
    const Int8Sizes sizes = {o.batch, o.heads[1], o.head_dim, o.attention.keys, values, true};
    return CacheView{.data = nullptr,
                     .batch_stride = 0,
                     .head_stride = 0,
                     .slot_stride = 0,
                     .layout = layout,
                     .int8 = int8_view(kOp, argument, tensors[i], tensors[i + 2], sizes)};
  };
  return {view(kKeys, 0, HeadsLayout::int8_keys), view("values", 1, HeadsLayout::int8_values)};
}

/// One for the layers of a call without a cache, all in the same memory.
CacheView own_cache(const LayerOptions& o, Scratch* scratch) {
  const int64_t slots = o.length * o.head_dim;
  const int64_t bytes = o.batch * o.heads[1] * slots * size_of(o.type);
  return {scratch->take<uint8_t>(bytes), o.heads[1] * slots, slots, o.head_dim, HeadsLayout::plain};
}

/// The mask of the first `keys` slots; a static cache has more.
std::optional<Tensor> cut_mask(const std::optional<Tensor>& mask, int64_t keys) {
  if (!mask.has_value() || mask->dim() != 4 || mask->size(3) <= keys) return mask;
  Tensor all = *mask;
  return torch::stable::narrow(all, 3, 0, keys);
}

Tensor decoder_layers(const Tensor& x, const TensorList& weights, const TensorList& cache,
                      const Tensor& start, const std::optional<Tensor>& cos,
                      const std::optional<Tensor>& sin, const std::optional<Tensor>& mask,
                      const std::optional<Tensor>& position_ids, const std::vector<int64_t>& heads,
                      int64_t head_dim, int64_t hidden, Text activation, double eps, double offset,
                      bool cast_before_weight, double qk_eps, double qk_offset, bool interleaved,
                      double scale, double softcap, double residual_multiplier, int64_t keep) {
  const Activation function = parse_activation(kOp, activation.take());
  SLMOPS_CHECK(x.dim() == 3, kOp, ": expected x of shape (batch, length, k), got ", shape(x));
  SLMOPS_CHECK(!weights.empty() && weights.size() % kLayerParts == 0, kOp,
               ": expected weights to be a list of ", size_t{kLayerParts},
               " tensors for each layer, got ", weights.size());
  const size_t count = weights.size() / kLayerParts;
  const size_t parts = cache.size() / count;
  SLMOPS_CHECK((parts == 0 || parts == 2 || parts == 4) && cache.size() == parts * count, kOp,
               ": expected cache to be keys and values of each of ", count,
               " layers, with two scales each for int8, or empty, got ", cache.size(), " tensors");
  SLMOPS_CHECK(heads.size() == 3 && heads[0] > 0 && heads[1] > 0 && heads[1] == heads[2] &&
                   heads[0] % heads[1] == 0,
               kOp, ": expected heads (q, k, v) with as many of k as of v, and of q a multiple");
  SLMOPS_CHECK(head_dim >= 1 && head_dim <= 256, kOp, ": expected a head_dim in 1..256, got ",
               head_dim);
  SLMOPS_CHECK(hidden >= 1 && hidden <= int64_t{1} << 40, kOp, ": expected hidden in 1..2^40, got ",
               hidden);
  SLMOPS_CHECK(std::isfinite(scale) && std::isfinite(residual_multiplier), kOp,
               ": expected finite scale and residual_multiplier, got ", scale, " and ",
               residual_multiplier);
  SLMOPS_CHECK(softcap >= 0 && std::isfinite(softcap), kOp,
               ": expected a softcap of 0 (none) or a positive number, got ", softcap);
  const int64_t batch = x.size(0), length = x.size(1), before = keys_before(start);
  SLMOPS_CHECK(before >= 0 && before <= kLargestPosition && (before == 0 || !cache.empty()), kOp,
               ": expected start to be the number of keys in the cache, got ", before);
  SLMOPS_CHECK(keep >= 0 && keep <= length, kOp, ": expected keep in 0..", length,
               ", the length of x, got ", keep);
  const DType type = float_type(kOp, "x", x.scalar_type());
  const RotaryTables tables(kOp, cos, sin, batch, length, head_dim);
  LayerOptions options = {.batch = batch,
                          .length = length,
                          .k = x.size(2),
                          .type = type,
                          .heads = {heads[0], heads[1], heads[2]},
                          .head_dim = head_dim,
                          .hidden = hidden,
                          .activation = function,
                          .eps = eps,
                          .offset = offset,
                          .cast_before_weight = cast_before_weight,
                          .qk_eps = qk_eps,
                          .qk_offset = qk_offset,
                          .residual_multiplier = static_cast<float>(residual_multiplier),
                          .angles = {},
                          .attention = {}};
  options.angles.length = length;
  options.angles.cos = tables.cos();
  options.angles.sin = tables.sin();
  options.angles.angle_type = tables.type();
  options.angles.angle_batch_stride = tables.batch_stride();
  options.angles.r = tables.r();
  options.angles.interleaved = interleaved;
  AttentionArgs& attention = options.attention;
  attention.batch = batch;
  attention.queries = length;
  attention.keys = before + length;
  attention.heads = heads[0];
  attention.kv_heads = heads[1];
  attention.d = attention.dv = head_dim;
  attention.causal = !mask.has_value();
  attention.scale = static_cast<float>(scale);
  attention.softcap = static_cast<float>(softcap);
  attention.read_ahead = tuned_read_ahead.load(std::memory_order_relaxed);
  const std::optional<Tensor> seen = set_mask(kOp, cut_mask(mask, attention.keys), &attention);
  const std::vector<int64_t> first = first_positions(position_ids, options);
  attention.first_position = first.empty() ? nullptr : first.data();
  const Tensor input = to_contiguous(x);
  const int64_t kept_length = keep == 0 ? length : keep;
  Tensor out = new_tensor({batch, kept_length, options.k}, x.scalar_type());

  Scratch scratch;
  const bool kept = !cache.empty();
  LayerCache own = {};
  if (!kept) own = {own_cache(options, &scratch), own_cache(options, &scratch)};
  std::deque<DecoderLayer> layers;
  int64_t cost = 0;
  for (size_t i = 0; i < count; ++i) {
    const LayerCache both = kept ? layer_cache(cache, parts, i, options) : own;
    layers.emplace_back(&weights[i * kLayerParts], options, both.keys, both.values,
                        i + 1 == count ? kept_length : length);
    cost += layers.back().cost() * options.rows();
  }
  if (out.numel() == 0) return out;
  const int64_t workers = Team::size_for(cost, options.rows());
  std::deque<DecoderLayer::Memory> memories;
  std::vector<const DecoderLayer::Memory*> memory_of;
  for (size_t i = 0; i < count; ++i) {
    if (i == 0 || !layers[i].is_like(layers[i - 1])) {
      memories.emplace_back(layers[i], workers, &scratch);
    }
    memory_of.push_back(&memories.back());
    layers[i].use(memories.back(), workers, &scratch);
  }
  void* state = out.mutable_data_ptr();
  if (count > 1 && kept_length < length) {
    state = scratch.take<uint8_t>(input.numel() * size_of(type));
  }
  Team::run(workers, [&](Worker& worker) {
    const void* hidden = input.const_data_ptr();
    for (size_t i = 0; i < count; ++i) {
      void* made = i + 1 == count ? out.mutable_data_ptr() : state;
      layers[i].run(&worker, *memory_of[i], hidden, made);
      hidden = made;
    }
  });
  return out;
}

/// The same with lists that `_keep` has.
Tensor kept_decoder_layers(const Tensor& x, int64_t weights, int64_t cache, const Tensor& start,
                           const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                           const std::optional<Tensor>& mask,
                           const std::optional<Tensor>& position_ids,
                           const std::vector<int64_t>& heads, int64_t head_dim, int64_t hidden,
                           Text activation, double eps, double offset, bool cast_before_weight,
                           double qk_eps, double qk_offset, bool interleaved, double scale,
                           double softcap, double residual_multiplier, int64_t keep) {
  return decoder_layers(x, *kept_list(kOp, weights), *kept_list(kOp, cache), start, cos, sin, mask,
                        position_ids, heads, head_dim, hidden, activation, eps, offset,
                        cast_before_weight, qk_eps, qk_offset, interleaved, scale, softcap,
                        residual_multiplier, keep);
}

// What follows the tensors of weights and cache.
constexpr char kArguments[] =
    "Tensor start, Tensor? cos, Tensor? sin, Tensor? mask, Tensor? position_ids, int[] "
    "heads_q_k_v, int head_dim, int hidden, str activation, float eps, float offset, bool "
    "cast_before_weight, float qk_eps, float qk_offset, bool interleaved, float scale, float "
    "softcap=0.0, float residual_multiplier=1.0, int keep=0) -> Tensor";

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  const std::string arguments = kArguments;
  m.def(("decoder_layers(Tensor x, Tensor[] weights, Tensor(a!)[] cache, " + arguments).c_str());
  m.def(("_kept_decoder_layers(Tensor x, int weights, int cache, " + arguments).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) {
  m.impl("decoder_layers", TORCH_BOX(&decoder_layers));
  m.impl("_kept_decoder_layers", TORCH_BOX(&kept_decoder_layers));
}

}  // namespace slmops
