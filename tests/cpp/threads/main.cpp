// Kernels, reader, teams and the choice of the row, used by several threads at once under
// ThreadSanitizer; what they compute is what one thread does.
#include <functional>

#include "../../../csrc/ops/parallel.h"
#include "../../../csrc/pack/checksum.h"
#include "../testing.h"

namespace slmops::testing {
namespace {

constexpr int kCallers = 3;

/// body(0) ... body(count - 1), each on a thread of its own.
void at_once(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

std::vector<const IsaRow*> runnable_rows() {
  int count = 0;
  const IsaRow* all = rows(&count);
  std::vector<const IsaRow*> found;
  for (int i = 0; i < count; ++i) {
    if (select(system_features(), all[i].name) != nullptr) found.push_back(&all[i]);
  }
  return found;
}

/// Phases of which each reads what others wrote in the one before.
void test_phases(Random& random) {
  std::vector<std::vector<int64_t>> expected(1, {1});
  for (int phase = 0; phase < 20; ++phase) {
    const std::vector<int64_t>& before = expected.back();
    std::vector<int64_t> next(static_cast<size_t>(random.integer(1, 60)));
    for (size_t i = 0; i < next.size(); ++i) {
      next[i] = before[i % before.size()] + 3 * before[(7 * i + 1) % before.size()] % 1000;
    }
    expected.push_back(next);
  }
  for (int64_t workers = 1; workers <= 5; ++workers) {
    for (int64_t threads : {int64_t{1}, workers / 2 + 1, workers}) {
      torch::stable::num_threads = threads;
      std::vector<std::vector<int64_t>> got = expected;
      for (size_t phase = 1; phase < got.size(); ++phase) got[phase].assign(got[phase].size(), -1);
      Team::run(workers, [&](Worker& worker) {
        for (size_t phase = 1; phase < got.size(); ++phase) {
          const std::vector<int64_t>& before = got[phase - 1];
          std::vector<int64_t>& next = got[phase];
          worker.share(static_cast<int64_t>(next.size()), [&](int64_t begin, int64_t end) {
            for (size_t i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
              next[i] = before[i % before.size()] + 3 * before[(7 * i + 1) % before.size()] % 1000;
            }
          });
        }
      });
      EXPECT(got == expected, "%lld workers on %lld threads", static_cast<long long>(workers),
             static_cast<long long>(threads));
    }
  }
}

/// norm(linear(x)) as an op computes it: codes, tiles and norms are phases of a team.
void run_op(const Packed& packed, const Block<float>& x, int64_t m, int64_t workers,
            Block<float>* out) {
  const Format& f = packed.format;
  Activations8 activations(f, m);
  Block<float> wide(m * f.k_padded), y(m * f.n), ones(f.n);
  for (int64_t i = 0; i < f.n; ++i) ones[i] = 1.0f;
  const int64_t scratch_size = (scratch_bytes(f, m) + 63) / 64 * 64;
  Block<uint8_t> scratch(workers * scratch_size);
  const QuantizedRows quantized = activations.rows();
  const SourceRows source = {x.data(), DType::f32, f.k, nullptr};
  LinearArgs args = {.format = &f,
                     .packed = packed.data.data(),
                     .rows = quantized,
                     .x = wide.data(),
                     .bias = nullptr,
                     .bias_type = DType::f32,
                     .out = y.data(),
                     .out_type = DType::f32,
                     .out_stride = f.n};
  const NormArgs norm = {.norm = {ones.data(), DType::f32, 1e-5f, 0.0f, DType::f32},
                         .x = y.data(),
                         .type = DType::f32,
                         .stride = f.n,
                         .out = out->data(),
                         .out_type = DType::f32,
                         .k = f.n};
  Team::run(workers, [&](Worker& worker) {
    const KernelTable& table = worker.table();
    worker.share(m, [&](int64_t begin, int64_t end) {
      table.quantize_rows(f, source, quantized, begin, end);
      table.widen_rows(f, source, wide.data(), begin, end);
    });
    LinearArgs mine = args;
    mine.scratch = scratch.data() + worker.index() * scratch_size;
    worker.share(f.tiles, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) table.linear(mine, tile, 0, m);
    });
    worker.share(m, [&](int64_t begin, int64_t end) { table.rms_norm(norm, begin, end); });
  });
}

/// Callers share a weight, while another thread chooses one row after the other.
void test_ops(Random& random) {
  const std::vector<const IsaRow*> all = runnable_rows();
  for (int i = 0; i < 12; ++i) {
    Format f = random_format(random);
    f.n = random.integer(100, 200);
    EXPECT(complete(&f) == nullptr, "%s", describe(f).c_str());
    const Packed packed(f, random);
    const int64_t m = random.pick({1, 2, 5, 20});
    Block<float> x(m * f.k);
    fill(random, DType::f32, 1.0f, 0, x.data(), x.count());
    torch::stable::num_threads = 1;
    set_isa("scalar");
    Block<float> expected(m * f.n);
    run_op(packed, x, m, 1, &expected);
    torch::stable::num_threads = 3;
    std::atomic<int> left{kCallers};
    std::thread chooser([&] {
      for (size_t at = 0; left > 0; ++at) {
        EXPECT(set_isa(all[at % all.size()]->name), "%s", all[at % all.size()]->name);
        std::this_thread::yield();
      }
    });
    at_once(kCallers, [&](int caller) {
      for (int again = 0; again < 5; ++again) {
        Block<float> got(m * f.n);
        run_op(packed, x, m, 1 + (caller + again) % 4, &got);
        EXPECT(got.same_bits(expected), "caller %d: %s", caller, describe(f).c_str());
      }
      --left;
    });
    chooser.join();
  }
}

/// Attention in splits, which a second phase merges, over one cache that all callers read.
void test_attention_in_phases(Random& random) {
  AttentionArgs args = {};
  args.batch = 1, args.queries = 5, args.keys = 600, args.kv_heads = 2, args.heads = 4;
  args.d = args.dv = 24;
  args.causal = true;
  args.scale = 0.2f;
  args.block = args.queries, args.blocks = 1, args.splits = 4;
  Block<int64_t> first(1);
  first[0] = -3;
  args.first_position = first.data();
  const auto heads = [&](Block<float>* block, int64_t length, int64_t count) {
    fill(random, DType::f32, 1.0f, 0, block->data(), block->count());
    return HeadView{block->data(), DType::f32, length * count * 24, count * 24, 24};
  };
  Block<float> q(5 * 4 * 24), k(600 * 2 * 24), v(600 * 2 * 24);
  args.q = heads(&q, 5, 4), args.k = heads(&k, 600, 2), args.v = heads(&v, 600, 2);
  const int64_t rows = args.batch * args.queries * args.heads;
  const int64_t scratch_size = (attention_scratch_bytes(args) + 63) / 64 * 64;
  const auto run = [&](int64_t workers, Block<float>* out) {
    Block<float> parts(rows * args.splits * part_floats(args.dv));
    Block<uint8_t> scratch(workers * scratch_size);
    AttentionArgs own = args;
    own.parts = parts.data();
    own.out = out->data();
    Team::run(workers, [&](Worker& worker) {
      uint8_t* mine = scratch.data() + worker.index() * scratch_size;
      worker.share(args.kv_heads * args.splits, [&](int64_t begin, int64_t end) {
        worker.table().attention(own, begin, end, mine);
      });
      worker.share(rows, [&](int64_t begin, int64_t end) {
        worker.table().attention_merge(own, begin, end);
      });
    });
  };
  for (const IsaRow* row : runnable_rows()) {
    set_isa(row->name);
    Block<float> expected(rows * 24);
    run(1, &expected);
    torch::stable::num_threads = 3;
    at_once(kCallers, [&](int caller) {
      Block<float> got(rows * 24);
      run(2 + caller, &got);
      EXPECT(got.same_bits(expected), "%s", row->name);
    });
  }
}

/// Tiles of one buffer are packed by several threads; then all read all of it.
void test_reader(Random& random) {
  torch::stable::num_threads = 4;
  for (int i = 0; i < 20; ++i) {
    Format f = random_format(random);
    f.n = random.integer(33, 160);
    EXPECT(complete(&f) == nullptr, "%s", describe(f).c_str());
    Packed packed(f, random);
    Block<uint8_t> again(f.total_bytes, 3);
    write_header(f, again.data());
    parallel(f.tiles, std::min<int64_t>(f.tiles, 4), [&](int64_t, int64_t begin, int64_t end) {
      pack_tiles(f, packed.parts(), again.data(), begin, end);
    });
    EXPECT(again.same_bits(packed.data), "%s", describe(f).c_str());
    const size_t bytes = static_cast<size_t>(f.total_bytes);
    const uint64_t checksum = chunk_checksum(again.data(), bytes);
    at_once(kCallers, [&](int) {
      Format read;
      EXPECT(read_header(again.data(), bytes, &read) == nullptr, "%s", describe(f).c_str());
      EXPECT(chunk_checksum(again.data(), bytes) == checksum, "%s", describe(f).c_str());
      Block<uint8_t> codes(packed.codes.count()), scale(packed.scale.count());
      Block<uint8_t> zero(packed.zero_point.count()), sub(packed.sub_scale.count());
      unpack_tiles(read, again.data(), {codes.data(), scale.data(), zero.data(), sub.data()}, 0,
                   read.tiles);
      EXPECT(codes.same_bits(packed.codes) && scale.same_bits(packed.scale), "%s",
             describe(f).c_str());
    });
  }
}

/// The row in use is always one that the features of the moment, old or new, can run.
void test_choice() {
  set_features(system_features());
  const std::vector<const IsaRow*> all = runnable_rows();
  at_once(4, [&](int thread) {
    for (int i = 0; i < 2000; ++i) {
      if (thread == 0) set_features(i % 2 == 0 ? 0 : system_features());
      if (thread == 1) set_isa(all[static_cast<size_t>(i) % all.size()]->name);
      const IsaRow* row = &current();
      EXPECT(std::find(all.begin(), all.end(), row) != all.end(), "%s", row->name);
    }
  });
  set_features(system_features());
}

}  // namespace
}  // namespace slmops::testing

int main() {
  using namespace slmops::testing;
  Random random(21);
  const auto step = [](const char* name, const auto& test) {
    std::printf("%s\n", name);
    std::fflush(stdout);
    test();
  };
  step("phases", [&] { test_phases(random); });
  step("ops", [&] { test_ops(random); });
  step("attention", [&] { test_attention_in_phases(random); });
  step("reader", [&] { test_reader(random); });
  step("choice", [] { test_choice(); });
  std::printf("passed\n");
  return 0;
}
