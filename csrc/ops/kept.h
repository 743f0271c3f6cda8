// Lists of tensors that stay here between calls: passing hundreds of tensors to an op takes longer
// than small layers take to compute.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace slmops {

using TensorList = std::vector<torch::stable::Tensor>;

/// The list that `_keep` gave this number; an error, in the name of `op`, if there is none.
std::shared_ptr<const TensorList> kept_list(const char* op, int64_t number);

}  // namespace slmops
