// What csrc/ops/team.h takes of torch, on plain threads: ThreadSanitizer does not know the barriers
// of torch's pool and would report races that are none.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline std::atomic<int64_t> num_threads{1};
inline int64_t get_num_threads() { return num_threads; }

/// Calls f(from, to) for at most get_num_threads() parts of [begin, end), each on its own thread.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t size = end - begin;
  const int64_t parts = std::clamp<int64_t>(size / std::max<int64_t>(1, grain), 1, num_threads);
  const int64_t length = (size + parts - 1) / parts;
  std::vector<std::thread> threads;
  for (int64_t at = begin + length; at < end; at += length) {
    threads.emplace_back([&f, at, to = std::min(at + length, end)] { f(at, to); });
  }
  f(begin, std::min(begin + length, end));
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable
