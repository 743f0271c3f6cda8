// _set_thread_limits, _thread_count: how many threads ops use, for torch_slmops.tuning.
#include <torch/csrc/stable/library.h>

#include "check.h"
#include "threads.h"

namespace slmops {
namespace {

void set_thread_limits(int64_t decode, int64_t prefill, int64_t of) {
  SLMOPS_CHECK(decode >= 0 && prefill >= 0 && of >= 0,
               "_set_thread_limits: expected numbers of threads, or 0 for no limit");
  thread_limits.decode.store(decode);
  thread_limits.prefill.store(prefill);
  thread_limits.of.store(of);
}

int64_t count(int64_t rows) { return thread_count(rows); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def("_set_thread_limits(int decode, int prefill, int of) -> ()");
  m.def("_thread_count(int rows) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CompositeExplicitAutograd, m) {
  m.impl("_set_thread_limits", TORCH_BOX(&set_thread_limits));
  m.impl("_thread_count", TORCH_BOX(&count));
}

}  // namespace slmops
