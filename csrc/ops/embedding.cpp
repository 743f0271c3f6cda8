// embedding: out[..., :] = w[ids[...], :] of a packed weight, each value rounded once to the output
// dtype.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../isa/isa.h"
#include "check.h"
#include "parallel.h"
#include "scratch.h"

namespace slmops {
namespace {

constexpr char kOp[] = "embedding";

template <class Id>
void copy_ids(const Tensor& ids, int64_t n, int64_t* out) {
  const Id* in = static_cast<const Id*>(ids.const_data_ptr());
  const int64_t count = ids.numel();
  for (int64_t i = 0; i < count; ++i) {
    SLMOPS_CHECK(in[i] >= 0 && in[i] < n, kOp, ": expected ids in 0..", n - 1, ", got ", in[i],
                 " at flat position ", i);
    out[i] = in[i];
  }
}

Tensor new_output(const Tensor& ids, int64_t dim, ScalarType type) {
  constexpr int64_t kMaxRank = 64;
  const int64_t rank = ids.dim();
  SLMOPS_CHECK(rank < kMaxRank, kOp, ": expected ids of fewer than ", kMaxRank, " dimensions, got ",
               rank);
  int64_t sizes[kMaxRank];
  std::copy_n(ids.sizes().data(), rank, sizes);
  sizes[rank] = dim;
  return new_tensor(sizes, rank + 1, type);
}

Tensor embedding(const Tensor& ids, const Tensor& packed, int64_t dim, ScalarType dtype) {
  const Format f = packed_format(kOp, packed);
  SLMOPS_CHECK(dim == f.k, kOp, ": expected dim == ", f.k, " (k of the packed weight), got ", dim);
  const DType type = float_type(kOp, "dtype", dtype);
  const ScalarType id_type = ids.scalar_type();
  SLMOPS_CHECK(id_type == ScalarType::Long || id_type == ScalarType::Int, kOp,
               ": expected ids of dtype int64 or int32, got ", name(id_type));
  const int64_t count = ids.numel();
  // Checked in a copy of our own, which another thread cannot change before the kernel reads it.
  Scratch scratch;
  int64_t* checked = scratch.take<int64_t>(count);
  const Tensor flat = to_contiguous(ids);
  if (id_type == ScalarType::Long) {
    copy_ids<int64_t>(flat, f.n, checked);
  } else {
    copy_ids<int32_t>(flat, f.n, checked);
  }
  Tensor out = new_output(ids, dim, dtype);
  if (count == 0) return out;
  uint8_t* data = static_cast<uint8_t*>(out.mutable_data_ptr());
  const uint8_t* weights = static_cast<const uint8_t*>(packed.const_data_ptr());
  const int64_t row_bytes = dim * size_of(type);
  const KernelTable& table = kernels();
  parallel(count, share_count(count, dim * 8), [&](int64_t, int64_t begin, int64_t end) {
    table.embedding(f, weights, checked + begin, end - begin, type, data + begin * row_bytes);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def("embedding(Tensor ids, Tensor packed, int dim, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("embedding", TORCH_BOX(&embedding)); }

}  // namespace slmops
