// The kernel's permission to use AMX tiles, and that `linear` of the `amx` row leaves none in use:
// on a CPU that has them.
#include <thread>

#include "testing.h"

namespace slmops::testing {

#if defined(__x86_64__)
namespace {

/// Whether the calling thread's tiles or their configuration are in use, as the CPU sees it when it
/// has to save them.
bool in_use() {
  constexpr uint32_t kTileState = 3u << 17;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return (low & kTileState) != 0;
}

void run_linear(const KernelTable& kernels, Packed& packed, int64_t rows, uint64_t seed,
                Block<float>* out) {
  const Format& f = packed.format;
  Random random(seed);
  Block<float> x(rows * f.k);
  fill(random, DType::f32, 1.0f, 0, x.data(), x.count());
  Activations8 activations(f, rows);
  Block<uint8_t> scratch(scratch_bytes(f, rows));
  const QuantizedRows quantized = activations.rows();
  kernels.quantize_rows(f, {x.data(), DType::f32, f.k, nullptr}, quantized, 0, rows);
  const LinearArgs args = {.format = &f,
                           .packed = packed.data.data(),
                           .rows = quantized,
                           .x = nullptr,
                           .bias = nullptr,
                           .bias_type = DType::f32,
                           .out = out->data(),
                           .out_type = DType::f32,
                           .out_stride = f.n,
                           .scratch = scratch.data()};
  for (int64_t tile = 0; tile < f.tiles; ++tile) kernels.linear(args, tile, 0, rows);
}

/// Two threads at once, each with its own tiles and its own configuration of them.
void test_threads(const KernelTable& kernels) {
  constexpr int64_t kRows = 40;
  Random random(6);
  Format formats[2];
  for (int i = 0; i < 2; ++i) {
    formats[i] = {.bits = 4, .scale_type = DType::f16, .n = 64, .k = 512};
    formats[i].group = formats[i].act_group = i == 0 ? 32 : 128;
    EXPECT(complete(&formats[i]) == nullptr, "%s", describe(formats[i]).c_str());
  }
  Packed first(formats[0], random), second(formats[1], random);
  Packed* packed[2] = {&first, &second};
  Block<float> expected[2] = {Block<float>(kRows * 64), Block<float>(kRows * 64)};
  Block<float> got[2] = {Block<float>(kRows * 64), Block<float>(kRows * 64)};
  bool left[2] = {true, true};
  std::thread threads[2];
  for (int i = 0; i < 2; ++i) {
    run_linear(*scalar_row().kernels, *packed[i], kRows, 7, &expected[i]);
    threads[i] = std::thread([&, i] {
      for (int again = 0; again < 20; ++again) run_linear(kernels, *packed[i], kRows, 7, &got[i]);
      left[i] = in_use();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < 2; ++i) {
    EXPECT(got[i].same_bits(expected[i]), "thread %d", i);
    EXPECT(!left[i], "thread %d left tiles in use", i);
  }
}

}  // namespace

void test_tiles() {
  if ((system_features() & kAmxTile) == 0) return;
  EXPECT(!in_use(), "tiles in use after linear");
  test_threads(*select(system_features(), "amx")->kernels);
}

#else

void test_tiles() {}

#endif

}  // namespace slmops::testing
