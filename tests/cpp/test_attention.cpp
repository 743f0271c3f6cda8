// attention in blocks of exact size: every row gives the bits of the scalar row, in items of any
// size, over all splits at once or split by split.
#include <algorithm>

#include "testing.h"

namespace slmops::testing {
namespace {

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};

/// [batch][length][heads][d] of random values, the last element the last of its block.
struct RandomHeads {
  RandomHeads(Random& random, DType type, int64_t batch, int64_t length, int64_t heads, int64_t d,
              int special)
      : data(batch * length * heads * d * size_of(type), 1) {
    fill(random, type, 1.0f, special, data.data(), batch * length * heads * d);
    const bool heads_first = random.chance(50);
    view = {.data = data.data(),
            .type = type,
            .batch_stride = length * heads * d,
            .length_stride = heads_first ? d : heads * d,
            .head_stride = heads_first ? length * d : d};
  }
  Block<uint8_t> data;
  HeadView view;
};

/// The same keys in blocks of 16 slots, what is beyond the last one included.
struct BlockedKeys {
  BlockedKeys(const RandomHeads& keys, const AttentionArgs& args)
      : data((args.keys + kKeyBlock - 1) / kKeyBlock * kKeyBlock * args.batch * args.kv_heads *
                 args.d * size_of(keys.view.type),
             1) {
    const int64_t size = size_of(keys.view.type);
    const int64_t head = (args.keys + kKeyBlock - 1) / kKeyBlock * kKeyBlock * args.d;
    std::fill_n(data.data(), data.count(), uint8_t{0xff});  // NaN
    view = keys.view;
    view.data = data.data();
    view.batch_stride = args.kv_heads * head;
    view.length_stride = 0;
    view.head_stride = head;
    for (int64_t b = 0; b < args.batch; ++b) {
      for (int64_t h = 0; h < args.kv_heads; ++h) {
        for (int64_t slot = 0; slot < args.keys; ++slot) {
          for (int64_t e = 0; e < args.d; ++e) {
            const int64_t from = b * keys.view.batch_stride + slot * keys.view.length_stride +
                                 h * keys.view.head_stride + e;
            const int64_t to = b * view.batch_stride + h * head +
                               (slot / kKeyBlock * args.d + e) * kKeyBlock + slot % kKeyBlock;
            std::copy_n(keys.data.data() + from * size, size, data.data() + to * size);
          }
        }
      }
    }
  }
  Block<uint8_t> data;
  HeadView view;
};

/// The same keys or values as int8, by `kernels`; blocks that nothing was stored in are 0xff.
struct Int8Heads {
  Int8Heads(const KernelTable& kernels, const RandomHeads& x, const AttentionArgs& args,
            bool values)
      : codes((args.keys + kKeyBlock - 1) / kKeyBlock * kKeyBlock * args.batch * args.kv_heads *
                  padded_head(args.d),
              1),
        scale(args.batch * args.kv_heads * args.keys) {
    std::fill_n(codes.data(), codes.count(), uint8_t{0xff});
    const int64_t head = (args.keys + kKeyBlock - 1) / kKeyBlock * kKeyBlock * padded_head(args.d);
    view = {.codes = codes.data(),
            .batch_stride = args.kv_heads * head,
            .head_stride = head,
            .scale = scale.data(),
            .scale_batch_stride = args.kv_heads * args.keys,
            .scale_head_stride = args.keys};
    const StoreArgs store = {.x = x.data.data(),
                             .type = x.view.type,
                             .batch_stride = x.view.batch_stride,
                             .length_stride = x.view.length_stride,
                             .head_stride = x.view.head_stride,
                             .length = args.keys,
                             .heads = args.kv_heads,
                             .d = args.d,
                             .out = view,
                             .values = values,
                             .first_slot = 0};
    kernels.store_int8(store, 0, args.batch * args.keys * args.kv_heads);
  }
  Block<uint8_t> codes;
  Block<float> scale;
  Int8View view;
};

/// The result in one thread, in blocks of `block` queries.
void run(const KernelTable& kernels, AttentionArgs args, int64_t block, bool apart, uint8_t* out) {
  args.block = std::min(block, args.queries);
  args.blocks = (args.queries + args.block - 1) / args.block;
  args.splits = apart ? (args.keys + kSplit - 2) / kSplit + 1 : 0;
  args.out = out;
  const int64_t rows = args.batch * args.queries * args.heads;
  Block<float> parts(rows * args.splits * part_floats(args.dv));
  args.parts = parts.data();
  const int64_t items = args.batch * args.kv_heads * args.blocks * (apart ? args.splits : 1);
  Block<uint8_t> scratch(attention_scratch_bytes(args));
  for (int64_t item = items; item-- > 0;) {
    kernels.attention(args, item, item + 1, scratch.data());
  }
  if (apart) kernels.attention_merge(args, 0, rows);
}

void test_attention(Random& random) {
  AttentionArgs args = {};
  args.batch = random.integer(1, 2);
  args.queries = random.integer(1, 12);
  args.keys = random.pick({0, 1, 17, 40, 256, 300});
  args.kv_heads = random.integer(1, 2);
  const int64_t group = random.pick({1, 2, 3, 5, 9});
  args.heads = args.kv_heads * group;
  args.d = random.integer(1, 40);
  args.is_int8 = random.chance(40);
  args.dv = args.is_int8 || random.chance(50) ? args.d : random.pick({1, 8, 16, 32, 40});
  const int special = random.pick({0, 0, 1, 20});
  const DType type = random.pick(kTypes), kv_type = random.pick(kTypes);
  const RandomHeads q(random, type, args.batch, args.queries, args.heads, args.d, special);
  const RandomHeads k(random, kv_type, args.batch, args.keys, args.kv_heads, args.d, special);
  const RandomHeads v(random, kv_type, args.batch, args.keys, args.kv_heads, args.dv, special);
  args.q = q.view;
  args.k = k.view;
  args.v = v.view;
  args.mask_type = random.pick(kTypes);
  args.mask_is_bool = random.chance(50);
  const bool all_heads = random.chance(50);
  const int64_t mask_count = args.batch * (all_heads ? args.heads : 1) * args.queries * args.keys;
  Block<uint8_t> mask(mask_count * (args.mask_is_bool ? 1 : size_of(args.mask_type)), 1);
  if (args.mask_is_bool) {
    for (int64_t i = 0; i < mask_count; ++i) mask[i] = random.chance(80);
  } else {
    fill(random, args.mask_type, 1.0f, 30, mask.data(), mask_count);
  }
  if (random.chance(70)) args.mask = mask.data();
  args.mask_query_stride = args.keys;
  args.mask_head_stride = all_heads ? args.queries * args.keys : 0;
  args.mask_batch_stride = (all_heads ? args.heads : 1) * args.queries * args.keys;
  Block<int64_t> first(args.batch);
  for (int64_t b = 0; b < args.batch; ++b) first[b] = random.integer(-600, 600);
  if (random.chance(70)) args.first_position = first.data();
  args.causal = random.chance(50);
  args.window = random.pick({0, 0, 1, 30, 270});
  args.scale = 0.3f;
  args.softcap = random.pick({0.0f, 0.0f, 2.0f});

  const Int8Heads k_int8(*scalar_row().kernels, k, args, false);
  const AttentionArgs of_values = [&] {
    AttentionArgs changed = args;
    changed.d = args.dv;
    return changed;
  }();
  const Int8Heads v_int8(*scalar_row().kernels, v, of_values, true);
  args.k_int8 = k_int8.view;
  args.v_int8 = v_int8.view;

  const int64_t bytes = args.batch * args.queries * args.heads * args.dv * size_of(type);
  Block<uint8_t> expected(bytes, 1);
  run(*scalar_row().kernels, args, args.queries, false, expected.data());
  const BlockedKeys blocked(k, args);
  const auto check = [&](const IsaRow& row) {
    for (const bool apart : {false, true}) {
      Block<uint8_t> got(bytes, 1);
      const int64_t block = random.integer(1, 12);
      args.k_blocked = random.chance(50);
      args.k = args.k_blocked ? blocked.view : k.view;
      const Int8Heads own(*row.kernels, k, args, false);
      EXPECT(own.codes.same_bits(k_int8.codes) && own.scale.same_bits(k_int8.scale),
             "store_int8 of %lld keys, d %lld, %s", static_cast<long long>(args.keys),
             static_cast<long long>(args.d), row.name);
      run(*row.kernels, args, block, apart, got.data());
      EXPECT(got.same_bits(expected),
             "attention of %lld queries in blocks of %lld, %lld keys, d %lld, %lld, apart %d, "
             "keys in blocks %d, int8 %d, %s",
             static_cast<long long>(args.queries), static_cast<long long>(block),
             static_cast<long long>(args.keys), static_cast<long long>(args.d),
             static_cast<long long>(args.dv), apart, args.k_blocked, args.is_int8, row.name);
    }
  };
  check(scalar_row());
  for (const IsaRow& row : other_rows()) check(row);
}

}  // namespace

void test_attention(int cases) {
  Random random(14);
  for (int i = 0; i < cases; ++i) test_attention(random);
}

}  // namespace slmops::testing
