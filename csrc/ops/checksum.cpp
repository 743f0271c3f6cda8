// _checksum: whether bytes are those that were saved. _copy_checksum: the same of bytes that are
// copied on the way, so that they are read once.
#include "../pack/checksum.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "check.h"
#include "parallel.h"

namespace slmops {
namespace {

void check_bytes(const char* op, const char* argument, const Tensor& bytes) {
  check_type(op, argument, bytes, ScalarType::Byte);
  SLMOPS_CHECK(bytes.dim() == 1 && bytes.is_contiguous(), op, ": expected ", argument,
               " of one dimension, contiguous, got shape ", shape(bytes));
}

/// The checksum of `bytes`, copied to `copy` where that is not null.
int64_t run(const Tensor& bytes, uint8_t* copy) {
  const uint8_t* data = static_cast<const uint8_t*>(bytes.const_data_ptr());
  const size_t size = static_cast<size_t>(bytes.numel());
  std::vector<uint64_t> chunks((size + kChecksumChunk - 1) / kChecksumChunk);
  const int64_t count = static_cast<int64_t>(chunks.size());
  parallel(count, std::max<int64_t>(1, share_count(count, kChecksumChunk)),
           [&](int64_t, int64_t begin, int64_t end) {
             for (int64_t i = begin; i < end; ++i) {
               const size_t at = static_cast<size_t>(i) * kChecksumChunk;
               const size_t length = std::min(kChecksumChunk, size - at);
               const uint8_t* chunk = data + at;
               if (copy != nullptr) {
                 chunk = static_cast<const uint8_t*>(memcpy(copy + at, chunk, length));
               }
               chunks[static_cast<size_t>(i)] = chunk_checksum(chunk, length);
             }
           });
  return static_cast<int64_t>(combine_checksums(chunks.data(), size));
}

int64_t checksum(const Tensor& bytes) {
  check_bytes("_checksum", "bytes", bytes);
  return run(bytes, nullptr);
}

int64_t copy_checksum(Tensor out, const Tensor& bytes) {
  check_bytes("_copy_checksum", "bytes", bytes);
  check_bytes("_copy_checksum", "out", out);
  SLMOPS_CHECK(out.numel() == bytes.numel(), "_copy_checksum: expected out of ", bytes.numel(),
               " bytes, got ", out.numel());
  return run(bytes, static_cast<uint8_t*>(out.mutable_data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def("_checksum(Tensor bytes) -> int");
  m.def("_copy_checksum(Tensor(a!) out, Tensor bytes) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) {
  m.impl("_checksum", TORCH_BOX(&checksum));
  m.impl("_copy_checksum", TORCH_BOX(&copy_checksum));
}

}  // namespace slmops
