// FpScope: the floating-point state that the arithmetic contract asks for, while a kernel runs.
//
// Round to nearest even, no flush-to-zero, no denormals-are-zero, no default-NaN mode, no traps.
// torch's pool threads keep the flush setting of the moment they were born, so every parallel body
// opens one.
#pragma once
#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <emmintrin.h>
#elif !defined(__aarch64__)
#include <cfenv>
#endif

namespace slmops {

/// Sets the state for its lifetime and restores the caller's; scopes nest.
class FpScope {
 public:
  FpScope() { enter(); }
  ~FpScope() { leave(); }
  FpScope(const FpScope&) = delete;
  FpScope& operator=(const FpScope&) = delete;

 private:
#if defined(__x86_64__) || defined(_M_X64)
  static constexpr uint32_t kControl =
      0xffc0;                                  // flush-to-zero, rounding, masks, denormals-are-zero
  static constexpr uint32_t kWanted = 0x1f80;  // all exceptions masked, the rest off

  void enter() {
    before_ = _mm_getcsr();
    if ((before_ & kControl) != kWanted) _mm_setcsr(kWanted);
  }
  // Where nothing was changed nothing is written: loading the register stalls the pipeline.
  void leave() {
    if ((before_ & kControl) != kWanted) _mm_setcsr(before_);
  }
  uint32_t before_;
#elif defined(__aarch64__)
  static uint64_t read() {
    uint64_t state;
    asm volatile("mrs %0, fpcr" : "=r"(state));
    return state;
  }
  static void write(uint64_t state) { asm volatile("msr fpcr, %0" : : "r"(state) : "memory"); }

  void enter() {
    before_ = read();
    if (before_ != 0) write(0);
  }
  void leave() {
    if (before_ != 0) write(before_);
  }
  uint64_t before_;
#else
  void enter() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  void leave() { std::fesetenv(&before_); }
  std::fenv_t before_;
#endif
};

}  // namespace slmops
