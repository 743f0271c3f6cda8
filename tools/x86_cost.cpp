// Inner loops of linear, marked for llvm-mca; tools/x86_cost.sh compiles them per row.
//
// A region is one pass over the lines of BLOCK k: 32 for int4, 16 for int8, 64 for sub16.
#include SLMOPS_DOTS

#include "../csrc/kernels/linear_dots.h"

namespace slmops::SLMOPS_ISA {

template <int kRows, int kLines, class Add>
SLMOPS_INLINE void loop(const uint8_t* lines, const int8_t* codes, int64_t count,
                        int64_t step_bytes, int64_t step_k, int32_t* out, const Add& add) {
  I32 sum[kRows][kLines];
  for (auto& row : sum) {
    for (I32& lane : row) lane = splat_i32(0);
  }
  for (int64_t i = 0; i < count; ++i, lines += step_bytes, codes += step_k) {
    add(lines, codes, i, sum);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int l = 0; l < kLines; ++l) store_i32(out + (r * kLines + l) * kLanes, sum[r][l]);
  }
}

#define BEGIN(name) asm volatile("# LLVM-MCA-BEGIN " name)
#define END(name) asm volatile("# LLVM-MCA-END " name)
#define LOOPS(ROWS, LINES)                                                                       \
  void int4_##ROWS(const uint8_t* w, const int8_t* a, int64_t stride, int64_t n, int32_t* out) { \
    loop<ROWS, LINES>(w, a, n, 512, 32, out, [&](auto w, auto a, int64_t, auto& sum) {           \
      BEGIN("int4 " #ROWS);                                                                      \
      add_int4<ROWS, LINES>(w, a, stride, sum);                                                  \
      END("int4 " #ROWS);                                                                        \
    });                                                                                          \
  }                                                                                              \
  void int8_##ROWS(const uint8_t* w, const int8_t* a, int64_t stride, int64_t n, int32_t* out) { \
    loop<ROWS, LINES>(w, a, n, 512, 16, out, [&](auto w, auto a, int64_t, auto& sum) {           \
      BEGIN("int8 " #ROWS);                                                                      \
      add_int8<ROWS, LINES>(w, a, stride, sum);                                                  \
      END("int8 " #ROWS);                                                                        \
    });                                                                                          \
  }                                                                                              \
  void sub16_##ROWS(const uint8_t* w, const int8_t* a, int64_t stride, int64_t n, int32_t* out,  \
                    const int32_t* presets) {                                                    \
    loop<ROWS, LINES>(w, a, n, 1088, 64, out, [&](auto w, auto a, int64_t i, auto& sum) {        \
      BEGIN("sub16 " #ROWS);                                                                     \
      add_sub16<ROWS, LINES>(w, 0, 0, a, stride, presets + 4 * i, 4, sum);                       \
      add_sub16<ROWS, LINES>(w, 1, 0, a + 16, stride, presets + 4 * i + 1, 4, sum);              \
      add_sub16<ROWS, LINES>(w, 2, 0, a + 32, stride, presets + 4 * i + 2, 4, sum);              \
      add_sub16<ROWS, LINES>(w, 3, 0, a + 48, stride, presets + 4 * i + 3, 4, sum);              \
      END("sub16 " #ROWS);                                                                       \
    });                                                                                          \
  }

LOOPS(1, 2)
LOOPS(4, 1)

}  // namespace slmops::SLMOPS_ISA
