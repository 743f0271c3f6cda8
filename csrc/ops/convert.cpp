// _convert: the project's one rounding between float32, bfloat16 and float16, as the kernels do it;
// for its tests.
#include <torch/csrc/stable/library.h>

#include "../isa/isa.h"
#include "check.h"
#include "parallel.h"

namespace slmops {
namespace {

Tensor convert(const Tensor& x, ScalarType dtype) {
  const DType from = float_type("_convert", "x", x.scalar_type());
  const DType to = float_type("_convert", "dtype", dtype);
  const Tensor in = to_contiguous(x);
  Tensor out = new_tensor(x.sizes().data(), x.dim(), dtype);
  const uint8_t* source = static_cast<const uint8_t*>(in.const_data_ptr());
  uint8_t* target = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t from_size = size_of(from), to_size = size_of(to);
  const int64_t count = in.numel();
  const KernelTable& table = kernels();
  parallel(count, share_count(count, 1), [&](int64_t, int64_t begin, int64_t end) {
    table.convert(source + begin * from_size, from, target + begin * to_size, to, end - begin);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def("_convert(Tensor x, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("_convert", TORCH_BOX(&convert)); }

}  // namespace slmops
