// A tensor [..., k] seen as rows of k elements that are contiguous, one stride apart.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace slmops {

/// Keeps what it points into alive: the tensor itself, or a copy where its strides do not fit.
class Rows {
 public:
  explicit Rows(const Tensor& t) : owner_(t), stride_(find_stride(t)) {
    if (stride_ < 0) {
      owner_ = torch::stable::contiguous(t);
      stride_ = last_size(t);
    }
  }
  const void* data() const { return owner_.const_data_ptr(); }
  /// In elements.
  int64_t stride() const { return stride_; }

 private:
  /// The stride between rows, or -1 where no single one fits.
  static int64_t find_stride(const Tensor& t) {
    const auto sizes = t.sizes();
    const auto strides = t.strides();
    const int64_t last = t.dim() - 1, k = sizes[last];
    if (k > 1 && strides[last] != 1) return -1;
    int64_t stride = k, span = 0;  // span: what the next dimension outwards has to step by
    bool found = false;
    for (int64_t i = last - 1; i >= 0; --i) {
      if (sizes[i] == 1) continue;
      if (!found) {
        stride = strides[i];
        found = true;
      } else if (strides[i] != span) {
        return -1;
      }
      span = strides[i] * sizes[i];
    }
    return stride;
  }

  Tensor owner_;
  int64_t stride_;
};

}  // namespace slmops
