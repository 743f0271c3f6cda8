// Checks of op arguments: dtypes, shapes, names, headers.
#include "check.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

namespace slmops {
namespace {

constexpr int64_t kMaxRank = 64;  // torch's own limit

void write_sizes(std::ostringstream& text, const int64_t* sizes, int64_t rank) {
  text << '(';
  for (int64_t i = 0; i < rank; ++i) text << (i > 0 ? ", " : "") << sizes[i];
  text << (rank == 1 ? ",)" : ")");
}

/// `size` rounded up to a multiple of `to`; both are checked by complete() afterwards, so a huge
/// one stays huge.
int64_t round_up(int64_t size, int64_t to) {
  if (size < 1 || to < 1 || size > std::numeric_limits<int64_t>::max() / 2) return size;
  return (size + to - 1) / to * to;
}

}  // namespace

std::string name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

std::string shape(const Tensor& t) {
  std::ostringstream text;
  write_sizes(text, t.sizes().data(), t.dim());
  return text.str();
}

DType float_type(const char* op, const char* argument, ScalarType type) {
  if (type == ScalarType::Float) return DType::f32;
  if (type == ScalarType::BFloat16) return DType::bf16;
  if (type == ScalarType::Half) return DType::f16;
  fail(op, ": expected ", argument, " to be float32, bfloat16 or float16, got ", name(type),
       "; convert it first");
}

ScalarType scalar_type(DType type) {
  if (type == DType::f32) return ScalarType::Float;
  return type == DType::bf16 ? ScalarType::BFloat16 : ScalarType::Half;
}

void check_type(const char* op, const char* argument, const Tensor& t, ScalarType expected) {
  SLMOPS_CHECK(t.scalar_type() == expected, op, ": expected ", argument, " of dtype ",
               name(expected), ", got ", name(t.scalar_type()));
}

void check_shape(const char* op, const char* argument, const Tensor& t,
                 std::initializer_list<int64_t> expected) {
  const auto sizes = t.sizes();
  if (std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end())) [[likely]]
    return;
  std::ostringstream text;
  write_sizes(text, expected.begin(), static_cast<int64_t>(expected.size()));
  fail(op, ": expected ", argument, " of shape ", text.str(), ", got ", shape(t));
}

bool is_finite(const void* values, int64_t count, DType type) {
  uint32_t bad = 0;
  if (type == DType::f32) {
    const uint32_t* bits = static_cast<const uint32_t*>(values);
    for (int64_t i = 0; i < count; ++i) bad |= (bits[i] & 0x7f800000u) == 0x7f800000u;
  } else {
    const uint16_t exponent = type == DType::f16 ? 0x7c00 : 0x7f80;
    const uint16_t* bits = static_cast<const uint16_t*>(values);
    for (int64_t i = 0; i < count; ++i) bad |= (bits[i] & exponent) == exponent;
  }
  return bad == 0;
}

Tensor to_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

Tensor new_tensor(const int64_t* sizes, int64_t rank, ScalarType type) {
  SLMOPS_CHECK(rank <= kMaxRank, "expected at most ", kMaxRank, " dimensions, got ", rank);
  int64_t strides[kMaxRank];
  int64_t stride = 1;
  for (int64_t i = rank - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle = nullptr;
  // The C call rather than torch::stable::empty: that one boxes six arguments for the dispatcher.
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      rank, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor new_rows(const Tensor& x, int64_t n, ScalarType type) {
  const int64_t rank = x.dim();
  SLMOPS_CHECK(rank <= kMaxRank, "expected x of at most ", kMaxRank, " dimensions, got ", rank);
  int64_t sizes[kMaxRank];
  std::copy_n(x.sizes().data(), rank, sizes);
  sizes[rank - 1] = n;
  return new_tensor(sizes, rank, type);
}

Format packed_format(const char* op, const Tensor& packed) {
  check_type(op, "packed", packed, ScalarType::Byte);
  SLMOPS_CHECK(packed.dim() == 1 && packed.is_contiguous() && packed.is_cpu(), op,
               ": expected packed to be 1-D, contiguous and on the CPU, got shape ", shape(packed),
               packed.is_cpu() ? "" : " on another device");
  Format f;
  const char* why = read_header(static_cast<const uint8_t*>(packed.const_data_ptr()),
                                static_cast<size_t>(packed.numel()), &f);
  SLMOPS_CHECK(why == nullptr, op, ": packed weights are not valid: ", why, " (", packed.numel(),
               " bytes)");
  return f;
}

Format make_format(const char* op, int64_t n, int64_t k, int64_t bits, ScaleKind scale_kind,
                   DType scale_type, ZeroKind zero_kind, int64_t group_size, int64_t act_group,
                   Activations activations) {
  Format f = {.bits = bits == 4 || bits == 8 ? static_cast<int32_t>(bits) : 0,
              .scale_kind = scale_kind,
              .scale_type = scale_type,
              .zero_kind = zero_kind,
              .activations = activations,
              .n = n,
              .k = k,
              .group = group_size,
              .act_group = act_group};
  if (group_size == -1) f.group = scale_kind == ScaleKind::sub16 ? kSubGroup : round_up(k, 32);
  if (act_group == -1) f.act_group = round_up(k, scale_block(f));
  const char* why = complete(&f);
  SLMOPS_CHECK(why == nullptr, op, ": ", why, ", got bits ", bits, ", group_size ", group_size,
               ", act_group ", act_group, " for a weight of ", n, " x ", k);
  return f;
}

ScaleKind parse_scale_kind(const char* op, const std::string& text) {
  if (text == "group") return ScaleKind::group;
  if (text == "sub16") return ScaleKind::sub16;
  fail(op, ": expected scale_kind \"group\" or \"sub16\", got \"", text, "\"");
}

Activations parse_activations(const char* op, const std::string& text) {
  if (text == "int8") return Activations::int8;
  if (text == "float") return Activations::floating;
  if (text == "float_fast") return Activations::float_fast;
  fail(op, ": expected activations \"int8\", \"float\" or \"float_fast\", got \"", text, "\"");
}

Activation parse_activation(const char* op, const std::string& text) {
  if (text == "silu") return Activation::silu;
  if (text == "gelu_tanh") return Activation::gelu_tanh;
  if (text == "gelu") return Activation::gelu_erf;
  if (text == "relu2") return Activation::relu2;
  fail(op, ": expected activation \"silu\", \"gelu_tanh\", \"gelu\" or \"relu2\", got \"", text,
       "\"");
}

}  // namespace slmops
