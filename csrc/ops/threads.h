// How many threads an op may use: torch's number, or fewer where fewer are faster.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace slmops {

/// Rows up to which a product waits for memory more than for its multiplications.
constexpr int64_t kDecodeRows = 16;

/// Limits of torch_slmops.tuning, in force as long as torch has `of` threads: who gives torch
/// another number has chosen. 0: none.
struct ThreadLimits {
  std::atomic<int64_t> decode{0}, prefill{0}, of{0};
};
inline ThreadLimits thread_limits;

/// Threads for a product of `rows` rows.
inline int64_t thread_count(int64_t rows) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads != thread_limits.of.load(std::memory_order_relaxed)) return threads;
  const auto& limit = rows <= kDecodeRows ? thread_limits.decode : thread_limits.prefill;
  const int64_t most = limit.load(std::memory_order_relaxed);
  return most > 0 ? std::min(most, threads) : threads;
}

}  // namespace slmops
