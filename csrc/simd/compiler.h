// What compilers spell differently. MSVC's side has not been compiled by anybody yet.
#pragma once

#if defined(_MSC_VER) && !defined(__clang__)

#include <intrin.h>
#include <math.h>

#define SLMOPS_INLINE __forceinline
#define SLMOPS_NOINLINE __declspec(noinline)
#define SLMOPS_PREFETCH(p) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0)
#define SLMOPS_PREFETCH_L2(p) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1)
#define SLMOPS_FMAF(x, y, z) fmaf(x, y, z)
#define SLMOPS_SQRTF(x) sqrtf(x)
/// Ends with all stores in memory, those to p too.
#define SLMOPS_SETTLE(p) (static_cast<void>(p), _ReadWriteBarrier())

#else

#define SLMOPS_INLINE inline __attribute__((always_inline))
#define SLMOPS_NOINLINE __attribute__((noinline))
#define SLMOPS_PREFETCH(p) __builtin_prefetch(p)
#define SLMOPS_PREFETCH_L2(p) __builtin_prefetch(p, 0, 2)
#define SLMOPS_FMAF(x, y, z) __builtin_fmaf(x, y, z)
#define SLMOPS_SQRTF(x) __builtin_sqrtf(x)
#define SLMOPS_SETTLE(p) asm volatile("" : : "r"(p) : "memory")

#endif
