// What the C++ tests share: checks that end the program, random numbers, heap blocks of exact size,
// the rows under test.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/isa/isa.h"

/// Ends the program with the text unless `condition` holds.
#define EXPECT(condition, ...)                                           \
  if (!(condition)) {                                                    \
    std::printf("%s:%d: expected %s: ", __FILE__, __LINE__, #condition); \
    std::printf(__VA_ARGS__);                                            \
    std::printf("\n");                                                   \
    std::exit(1);                                                        \
  }

namespace slmops::testing {

#if defined(__aarch64__) && !defined(__clang__)
using Half = __fp16;  // g++ 12 has _Float16 in C++ only on x86
#else
using Half = _Float16;
#endif

/// splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  /// In low..high, both included.
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(int percent) { return integer(0, 99) < percent; }
  /// In [-1, 1).
  float unit() { return static_cast<float>(integer(-(1 << 24), (1 << 24) - 1)) * 0x1p-24f; }
  template <class T, size_t kCount>
  T pick(const T (&values)[kCount]) {
    return values[bits() % kCount];
  }

 private:
  uint64_t state_;
};

/// A heap block whose last byte is the last of its allocation: AddressSanitizer sees every access
/// beyond it.
template <class T>
class Block {
 public:
  explicit Block(int64_t count, int64_t offset = 0)
      : count_(count),
        base_(static_cast<uint8_t*>(std::malloc(static_cast<size_t>(bytes() + offset)))),
        data_(reinterpret_cast<T*>(base_ + offset)) {
    memset(base_, 0xa5, static_cast<size_t>(bytes() + offset));
  }
  ~Block() { std::free(base_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }
  bool same_bits(const Block& other) const {
    return count_ == other.count_ && memcmp(data_, other.data_, static_cast<size_t>(bytes())) == 0;
  }

 private:
  int64_t count_;
  uint8_t* base_;
  T* data_;
};

constexpr int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

/// The scalar row, which every other one has to equal.
const IsaRow& scalar_row();
/// Makes the row `name` of the table the only one under test, whatever the CPU is said to offer.
/// Before any of the next two.
void choose_row(const char* name);
/// All other rows that can run here, emulated ones included.
const std::vector<IsaRow>& other_rows();
/// The same, and rows that only have quantize_rows, widen_rows, linear and embedding.
const std::vector<IsaRow>& linear_rows();

/// From here on `fill` gives no negative numbers. Bochs 3.0 needs that for `amx`: it multiplies the
/// signed bytes of tdpbsud as unsigned ones.
void fill_without_signs();
/// Random values of a type in 16 or 32 bits. `special`: percent of infinities, NaN, zeros,
/// denormals and huge ones.
void fill(Random& random, DType type, float size, int special, void* out, int64_t count);

/// A random valid format with small sizes. `shape` limits: n <= 70, k <= 300.
Format random_format(Random& random);
std::string describe(const Format& f);

/// A random packed weight of this format, at an odd address in a block of exact size.
struct Packed {
  Packed(const Format& f, Random& random);
  Format format;
  Block<uint8_t> codes;
  Block<uint8_t> scale;  // any type
  Block<uint8_t> zero_point;
  Block<uint8_t> sub_scale;
  Block<uint8_t> data;
  Parts parts() { return {codes.data(), scale.data(), zero_point.data(), sub_scale.data()}; }
};

/// Memory for `m` rows of activations of this format.
struct Activations8 {
  Activations8(const Format& f, int64_t m)
      : codes(m * f.k_padded),
        scale(m * (f.k_padded / f.act_group)),
        presets(m * presets_per_row(f)),
        blocks(code_block_bytes(f, m)) {}
  Block<int8_t> codes;
  Block<float> scale;
  Block<int32_t> presets;
  Block<int8_t> blocks;
  QuantizedRows rows() {
    return {codes.data(), scale.data(), presets.data(),
            blocks.count() == 0 ? nullptr : blocks.data()};
  }
};

// The tests, one file each.
void test_header();
void test_pack();
void test_checksum();
void test_convert(bool full);
void test_kernels(int cases);
void test_matrix(int cases);
/// Sums as long as int32 allows, or a part of that.
void test_limits(int part);
void test_tiles();
void test_quantize_weight(int cases);
void test_fp_scope();
void test_activations(bool full);
void test_vectors(int cases);
void test_sin_cos(int angles);
void test_fused(int cases);
void test_attention(int cases);

}  // namespace slmops::testing
