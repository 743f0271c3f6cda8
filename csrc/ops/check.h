// Checks of op arguments and the one form of their messages: "op: expected what (why), got what".
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../kernels/kernels.h"

/// Throws std::runtime_error with the concatenated rest unless `condition` holds; builds no text
/// where it does.
#define SLMOPS_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]]     \
  ::slmops::fail(__VA_ARGS__)

namespace slmops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

/// A dtype as Python spells it.
std::string name(ScalarType type);
/// Sizes as Python spells them: "(3, 2048)".
std::string shape(const Tensor& t);

/// The last dimension's size; `t` has at least one.
inline int64_t last_size(const Tensor& t) { return t.size(t.dim() - 1); }

inline bool is_present(const std::optional<Tensor>& t) { return t.has_value() && t->numel() > 0; }

/// float32, bfloat16 or float16 as the kernels' type; an error for any other.
DType float_type(const char* op, const char* argument, ScalarType type);
ScalarType scalar_type(DType type);

void check_type(const char* op, const char* argument, const Tensor& t, ScalarType expected);
/// Exactly these sizes.
void check_shape(const char* op, const char* argument, const Tensor& t,
                 std::initializer_list<int64_t> expected);

/// Whether none of `count` values at `values` is an infinity or a NaN.
bool is_finite(const void* values, int64_t count, DType type);

/// Bytes of an element.
constexpr int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

/// `t` itself where it is contiguous, else a contiguous copy.
Tensor to_contiguous(const Tensor& t);

/// An uninitialized contiguous CPU tensor.
Tensor new_tensor(const int64_t* sizes, int64_t rank, ScalarType type);
inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType type) {
  return new_tensor(sizes.begin(), static_cast<int64_t>(sizes.size()), type);
}

/// One for x of [..., k] with last size n instead.
Tensor new_rows(const Tensor& x, int64_t n, ScalarType type);

/// The header of `packed` after all checks of it and of the tensor.
Format packed_format(const char* op, const Tensor& packed);

/// The completed format that pack_'s arguments describe; -1 for `group_size` or `act_group` is the
/// whole k.
Format make_format(const char* op, int64_t n, int64_t k, int64_t bits, ScaleKind scale_kind,
                   DType scale_type, ZeroKind zero_kind, int64_t group_size, int64_t act_group,
                   Activations activations);

ScaleKind parse_scale_kind(const char* op, const std::string& text);
Activations parse_activations(const char* op, const std::string& text);
/// An activation of the ops: "silu", "gelu_tanh", "gelu" or "relu2".
Activation parse_activation(const char* op, const std::string& text);

}  // namespace slmops
