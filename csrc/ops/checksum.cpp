// _checksum: whether bytes are those that were saved.
#include "../pack/checksum.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "check.h"
#include "parallel.h"

namespace slmops {
namespace {

int64_t checksum(const Tensor& bytes) {
  check_type("_checksum", "bytes", bytes, ScalarType::Byte);
  SLMOPS_CHECK(bytes.dim() == 1 && bytes.is_contiguous(),
               "_checksum: expected bytes of one dimension, contiguous, got shape ", shape(bytes));
  const uint8_t* data = static_cast<const uint8_t*>(bytes.const_data_ptr());
  const size_t size = static_cast<size_t>(bytes.numel());
  std::vector<uint64_t> chunks((size + kChecksumChunk - 1) / kChecksumChunk);
  const int64_t count = static_cast<int64_t>(chunks.size());
  parallel(count, std::max<int64_t>(1, share_count(count, kChecksumChunk)),
           [&](int64_t, int64_t begin, int64_t end) {
             for (int64_t i = begin; i < end; ++i) {
               const size_t at = static_cast<size_t>(i) * kChecksumChunk;
               chunks[static_cast<size_t>(i)] =
                   chunk_checksum(data + at, std::min(kChecksumChunk, size - at));
             }
           });
  return static_cast<int64_t>(combine_checksums(chunks.data(), size));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) { m.def("_checksum(Tensor bytes) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("_checksum", TORCH_BOX(&checksum)); }

}  // namespace slmops
