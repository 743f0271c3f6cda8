// Team: threads that go through the phases of an op together, in one parallel region. A phase's
// items are shared out among them; the next phase begins when all are done.
//
// torch's parallel_for promises no concurrency (nested calls run serially, a thread limit gives
// fewer threads), so nobody waits for a thread to arrive: whoever is there takes what is left, and
// who comes late finds it done.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "../isa/isa.h"
#include "fp_scope.h"
#include "threads.h"

namespace slmops {

/// Multiply-adds worth waking a thread for (1-3 us): a microsecond of one core is some 2^16.
constexpr int64_t kThreadCost = int64_t{1} << 16;

class Worker;

/// What the workers of an op share. Each worker has items of its own in every phase; those of all
/// phases have numbers ("tickets") in one sequence, so that counters only ever grow.
class Team {
 public:
  /// How many workers a product of `rows` rows, `cost` multiply-adds in all, is worth.
  static int64_t size_for(int64_t cost, int64_t rows) {
    return std::clamp<int64_t>(cost / kThreadCost, 1, thread_count(rows));
  }

  /// Calls body(worker) for each of `workers` workers, which must go through the same phases. An
  /// exception in body ends the process: check before.
  template <class Body>
  static void run(int64_t workers, const Body& body);

 private:
  friend class Worker;
  explicit Team(int64_t workers) : workers_(workers), taken_(static_cast<size_t>(workers)) {}

  struct alignas(64) Counter {
    std::atomic<int64_t> count{0};
  };
  const int64_t workers_;
  const IsaRow& row_ = current();
  const FastKernels* const fast_ = fast_kernels(row_);
  std::vector<Counter> taken_;  // of each worker's tickets
  Counter done_;                // of all
};

/// One of a team, on one thread.
class Worker {
 public:
  Worker(Team* team, int64_t index)
      : team_(*team), index_(index), first_(static_cast<size_t>(team->workers_)) {}

  /// In 0 .. size() - 1: scratch of this number is its own.
  int64_t index() const { return index_; }
  int64_t size() const { return team_.workers_; }
  /// Those of the row in use when the op began: another thread may choose a row meanwhile, and what
  /// one row prepares another cannot read.
  const KernelTable& table() const { return *team_.row_.kernels; }
  /// The bf16 kernels beside them, or null.
  const FastKernels* fast() const { return team_.fast_; }

  /// A phase: body(begin, end) for parts of [0, items), by whichever worker; returns when all are
  /// done.
  template <class Body>
  void share(int64_t items, const Body& body) {
    if (size() == 1) {
      if (items > 0) body(int64_t{0}, items);
      return;
    }
    for (int64_t i = 0; i < size(); ++i) take_from((index_ + i) % size(), items, body);
    const int64_t least = items / size(), rest = items % size();
    for (int64_t i = 0; i < size(); ++i) first_[static_cast<size_t>(i)] += least + (i < rest);
    all_ += items;
    wait_for(all_);
  }

 private:
  /// Items of `owner` in this phase, while there are any: its own in long runs, those of others one
  /// by one.
  template <class Body>
  void take_from(int64_t owner, int64_t items, const Body& body) {
    const int64_t least = items / size(), rest = items % size();
    const int64_t first = first_[static_cast<size_t>(owner)];
    const int64_t end = first + least + (owner < rest);
    const int64_t begin = least * owner + std::min(owner, rest);
    std::atomic<int64_t>& taken = team_.taken_[static_cast<size_t>(owner)].count;
    int64_t next = taken.load(std::memory_order_relaxed);
    while (next < end) {
      const int64_t count = owner == index_ ? (end - next + 1) / 2 : 1;
      if (!taken.compare_exchange_weak(next, next + count, std::memory_order_relaxed)) continue;
      body(begin + next - first, begin + next - first + count);
      team_.done_.count.fetch_add(count, std::memory_order_acq_rel);
      next = taken.load(std::memory_order_relaxed);
    }
  }

  void wait_for(int64_t ticket) const {
    constexpr int kSpins = 1 << 12;  // some 100 us; longer waits leave the core to others
    for (int i = 0; team_.done_.count.load(std::memory_order_acquire) < ticket; ++i) {
      if (i < kSpins) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
  }
  static void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
  }

  Team& team_;
  const int64_t index_;
  std::vector<int64_t> first_;  // the ticket of each worker's first item in the next phase
  int64_t all_ = 0;             // tickets before the next phase
};

template <class Body>
void Team::run(int64_t workers, const Body& body) {
  Team team(workers);
  const auto run = [&](int64_t begin, int64_t end) noexcept {
    const FpScope scope;
    for (int64_t i = begin; i < end; ++i) {
      Worker worker(&team, i);
      body(worker);
    }
  };
  if (workers == 1) return run(0, 1);
  torch::stable::parallel_for(0, workers, 1, run);
}

}  // namespace slmops
