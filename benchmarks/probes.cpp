// What this machine can do at best: memory read bandwidth, int8 and fp32 multiply-add rate, on a
// given number of threads. Built for the machine it runs on (-march=native); only benchmarks use
// it.
#include <immintrin.h>

#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class Body>
double timed(int threads, const Body& body) {
  const double start = seconds();
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&body, i] { body(i); });
  body(0);
  for (std::thread& t : others) t.join();
  return seconds() - start;
}

// Reads [p, p + bytes) in `kStreams` interleaved sequential streams.
template <int kStreams>
int64_t read_all(const uint8_t* p, int64_t bytes) {
  const int64_t part = bytes / kStreams / 256 * 256;
  __m256i x[8] = {};
  for (int64_t i = 0; i < part; i += 256) {
    for (int s = 0; s < kStreams; ++s) {
      const __m256i* q = reinterpret_cast<const __m256i*>(p + s * part + i);
      for (int j = 0; j < 8; ++j) x[j] = _mm256_xor_si256(x[j], _mm256_loadu_si256(q + j));
    }
  }
  for (int j = 1; j < 8; ++j) x[0] = _mm256_xor_si256(x[0], x[j]);
  return _mm256_extract_epi64(x[0], 0);
}

// One multiply-add instruction group over registers: the fastest legal int8 dot of the instruction
// set.
void dots(int64_t count) {
#if defined(__AVX512VNNI__)
  for (int64_t i = 0; i < count; ++i) {
    asm volatile(
        "vpdpbusd %%zmm30, %%zmm31, %%zmm0\n vpdpbusd %%zmm30, %%zmm31, %%zmm1\n"
        "vpdpbusd %%zmm30, %%zmm31, %%zmm2\n vpdpbusd %%zmm30, %%zmm31, %%zmm3\n"
        "vpdpbusd %%zmm30, %%zmm31, %%zmm4\n vpdpbusd %%zmm30, %%zmm31, %%zmm5\n"
        "vpdpbusd %%zmm30, %%zmm31, %%zmm6\n vpdpbusd %%zmm30, %%zmm31, %%zmm7\n"
        "vpdpbusd %%zmm30, %%zmm31, %%zmm8\n vpdpbusd %%zmm30, %%zmm31, %%zmm9\n"
        "vpdpbusd %%zmm30, %%zmm31, %%zmm10\n vpdpbusd %%zmm30, %%zmm31, %%zmm11\n" ::
            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
              "xmm10", "xmm11");
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    asm volatile(
        "vpmaddubsw %%ymm14, %%ymm15, %%ymm0\n vpmaddubsw %%ymm14, %%ymm15, %%ymm1\n"
        "vpmaddubsw %%ymm14, %%ymm15, %%ymm2\n vpmaddubsw %%ymm14, %%ymm15, %%ymm3\n"
        "vpmaddubsw %%ymm14, %%ymm15, %%ymm4\n vpmaddubsw %%ymm14, %%ymm15, %%ymm5\n"
        "vpmaddwd %%ymm13, %%ymm0, %%ymm0\n vpmaddwd %%ymm13, %%ymm1, %%ymm1\n"
        "vpmaddwd %%ymm13, %%ymm2, %%ymm2\n vpmaddwd %%ymm13, %%ymm3, %%ymm3\n"
        "vpmaddwd %%ymm13, %%ymm4, %%ymm4\n vpmaddwd %%ymm13, %%ymm5, %%ymm5\n"
        "vpaddd %%ymm0, %%ymm6, %%ymm6\n vpaddd %%ymm1, %%ymm7, %%ymm7\n"
        "vpaddd %%ymm2, %%ymm8, %%ymm8\n vpaddd %%ymm3, %%ymm9, %%ymm9\n"
        "vpaddd %%ymm4, %%ymm10, %%ymm10\n vpaddd %%ymm5, %%ymm11, %%ymm11\n" ::
            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
              "xmm10", "xmm11");
  }
#endif
}

// Twelve independent fp32 multiply-adds of the widest registers, `count` times.
void multiply_adds(int64_t count) {
#if defined(__AVX512F__)
#define FMA(sum) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" sum "\n"
#else
#define FMA(sum) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" sum "\n"
#endif
  for (int64_t i = 0; i < count; ++i) {
    asm volatile(FMA("0") FMA("1") FMA("2") FMA("3") FMA("4") FMA("5") FMA("6") FMA("7") FMA("8")
                     FMA("9") FMA("10") FMA("11")::
                         : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
                           "xmm9", "xmm10", "xmm11");
  }
#undef FMA
}

}  // namespace

extern "C" {

/// Bytes per second of reading `bytes` at `p` once, best of three loops.
double read_bandwidth(const uint8_t* p, int64_t bytes, int threads) {
  volatile int64_t sink = 0;
  const int64_t part = bytes / threads / 4096 * 4096;
  const auto run = [&](auto read) {
    return timed(threads, [&](int i) { sink = sink + read(p + i * part, part); });
  };
  double best = run([](const uint8_t* q, int64_t n) { return read_all<1>(q, n); });
  const double two = run([](const uint8_t* q, int64_t n) { return read_all<2>(q, n); });
  const double four = run([](const uint8_t* q, int64_t n) { return read_all<4>(q, n); });
  if (two < best) best = two;
  if (four < best) best = four;
  return static_cast<double>(part * threads) / best;
}

/// int8 operations (2 per multiply-add) per second, dot instructions in registers only.
double int8_peak(int threads) {
#if defined(__AVX512VNNI__)
  constexpr double kOps = 12 * 128;
#else
  constexpr double kOps = 6 * 64;
#endif
  constexpr int64_t kCount = 4000000;
  const double time = timed(threads, [](int) { dots(kCount); });
  return kOps * static_cast<double>(kCount) * threads / time;
}

/// fp32 multiply-adds per second, in registers only; these hold zeros or whatever was there.
double fp32_peak(int threads) {
#if defined(__AVX512F__)
  constexpr double kWidth = 16;
#else
  constexpr double kWidth = 8;
#endif
  constexpr int64_t kCount = 4000000;
  const double time = timed(threads, [](int) { multiply_adds(kCount); });
  return 12 * kWidth * static_cast<double>(kCount) * threads / time;
}
}
