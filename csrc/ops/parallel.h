// Work shares on torch's thread pool, each inside an FpScope.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "team.h"

namespace slmops {

/// How many shares to cut `items` into: at most one per thread, and none that costs less than
/// waking a thread. `cost` of an item is in multiply-adds.
inline int64_t share_count(int64_t items, int64_t cost) {
  const int64_t worth = items / std::max<int64_t>(1, kThreadCost / std::max<int64_t>(1, cost));
  if (worth <= 1) return 1;
  return std::min<int64_t>(worth, thread_count(kDecodeRows + 1));
}

/// Calls body(share, begin, end) once for each of `shares` contiguous parts of [0, items). A share
/// runs on one thread, so it may own scratch number `share`. An exception in body ends the process:
/// check before.
template <class Body>
void parallel(int64_t items, int64_t shares, const Body& body) {
  const int64_t least = items / shares, rest = items % shares;
  const auto begin_of = [&](int64_t share) { return least * share + std::min(share, rest); };
  const auto run = [&](int64_t first, int64_t last) noexcept {
    const FpScope scope;
    for (int64_t share = first; share < last; ++share) {
      body(share, begin_of(share), begin_of(share + 1));
    }
  };
  if (shares == 1) return run(0, 1);
  torch::stable::parallel_for(0, shares, 1, run);
}

}  // namespace slmops
