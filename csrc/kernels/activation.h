// The activations of simd/math.h by their number: chosen once, outside of a kernel's loop.
#pragma once
#include "common.h"

namespace slmops::SLMOPS_ISA {
namespace {

/// An activation known at compile time, for with_activation's body.
template <Activation kActivation>
struct ActivationConstant {
  static constexpr Activation value = kActivation;
};

template <Activation kActivation>
SLMOPS_INLINE F32 activate(F32 x) {
  if constexpr (kActivation == Activation::silu) return silu(x);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu_tanh(x);
  if constexpr (kActivation == Activation::gelu_erf) return gelu_erf(x);
  if constexpr (kActivation == Activation::relu2) return relu2(x);
  if constexpr (kActivation == Activation::sigmoid) return sigmoid(x);
  if constexpr (kActivation == Activation::exp) return exp(x);
  if constexpr (kActivation == Activation::tanh) return tanh(x);
}

/// Calls body(ActivationConstant<a>{}), whose loop uses activate<decltype(constant)::value>.
template <class Body>
SLMOPS_INLINE void with_activation(Activation a, const Body& body) {
  switch (a) {
    case Activation::silu:
      return body(ActivationConstant<Activation::silu>{});
    case Activation::gelu_tanh:
      return body(ActivationConstant<Activation::gelu_tanh>{});
    case Activation::gelu_erf:
      return body(ActivationConstant<Activation::gelu_erf>{});
    case Activation::relu2:
      return body(ActivationConstant<Activation::relu2>{});
    case Activation::sigmoid:
      return body(ActivationConstant<Activation::sigmoid>{});
    case Activation::exp:
      return body(ActivationConstant<Activation::exp>{});
    case Activation::tanh:
      return body(ActivationConstant<Activation::tanh>{});
  }
}

inline void apply_activation(Activation a, const float* x, float* y, int64_t count) {
  with_activation(a, [&](auto constant) {
    constexpr Activation kActivation = decltype(constant)::value;
    for_lanes(count, [&](int64_t i, auto lanes) {
      const F32 result = activate<kActivation>(load_lanes(DType::f32, x, i, lanes));
      store_lanes(DType::f32, y, i, result, lanes);
    });
  });
}

}  // namespace
}  // namespace slmops::SLMOPS_ISA
