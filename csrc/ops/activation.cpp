// _activation: y[i] = f(x[i]) in fp32 for the functions of csrc/simd/math.h, as kernels apply them;
// for their tests.
#include <torch/csrc/stable/library.h>

#include "../isa/isa.h"
#include "check.h"
#include "parallel.h"
#include "text.h"

namespace slmops {
namespace {

constexpr char kOp[] = "_activation";
constexpr int64_t kCost = 32;  // an element costs about as much as so many multiply-adds

Activation parse_function(const std::string& text) {
  if (text == "sigmoid") return Activation::sigmoid;
  if (text == "exp") return Activation::exp;
  if (text == "tanh") return Activation::tanh;
  return parse_activation(kOp, text);
}

Tensor activation(const Tensor& x, Text function) {
  const Activation a = parse_function(function.take());
  check_type(kOp, "x", x, ScalarType::Float);
  const Tensor in = to_contiguous(x);
  Tensor out = new_tensor(x.sizes().data(), x.dim(), ScalarType::Float);
  const float* source = static_cast<const float*>(in.const_data_ptr());
  float* target = static_cast<float*>(out.mutable_data_ptr());
  const int64_t count = in.numel();
  const KernelTable& table = kernels();
  parallel(count, share_count(count, kCost), [&](int64_t, int64_t begin, int64_t end) {
    table.activation(a, source + begin, target + begin, end - begin);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) { m.def("_activation(Tensor x, str name) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(slmops, CPU, m) { m.impl("_activation", TORCH_BOX(&activation)); }

}  // namespace slmops
