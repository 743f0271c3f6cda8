// How many threads ops use and how far ahead they read, for torch_slmops.tuning.
#include <torch/csrc/stable/library.h>

#include "check.h"
#include "matmul.h"
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

void set_read_ahead(int64_t bytes) {
  SLMOPS_CHECK(bytes >= 0 && bytes <= kMostReadAhead,
               "_set_read_ahead: expected a number of bytes in 0..", kMostReadAhead, ", got ",
               bytes);
  tuned_read_ahead.store(bytes);
}

int64_t read_ahead() { return tuned_read_ahead.load(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def("_set_thread_limits(int decode, int prefill, int of) -> ()");
  m.def("_thread_count(int rows) -> int");
  m.def("_set_read_ahead(int bytes) -> ()");
  m.def("_read_ahead() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CompositeExplicitAutograd, m) {
  m.impl("_set_thread_limits", TORCH_BOX(&set_thread_limits));
  m.impl("_thread_count", TORCH_BOX(&count));
  m.impl("_set_read_ahead", TORCH_BOX(&set_read_ahead));
  m.impl("_read_ahead", TORCH_BOX(&read_ahead));
}

}  // namespace slmops
