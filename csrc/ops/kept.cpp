#include "kept.h"

#include <torch/csrc/stable/library.h>

#include <mutex>
#include <unordered_map>

#include "check.h"

namespace slmops {
namespace {

struct Kept {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const TensorList>> lists;
  int64_t next = 1;
};

/// Never destroyed: at the end of a process nobody knows whether torch is still there.
Kept& kept() {
  static Kept* const all = new Kept;
  return *all;
}

int64_t keep(std::vector<Tensor> tensors) {
  auto list = std::make_shared<const TensorList>(std::move(tensors));
  const std::lock_guard lock(kept().mutex);
  kept().lists.emplace(kept().next, std::move(list));
  return kept().next++;
}

void drop(int64_t number) {
  std::shared_ptr<const TensorList> last;  // freed after the lock: memory may take its time
  const std::lock_guard lock(kept().mutex);
  const auto found = kept().lists.find(number);
  if (found == kept().lists.end()) return;
  last = std::move(found->second);
  kept().lists.erase(found);
}

}  // namespace

std::shared_ptr<const TensorList> kept_list(const char* op, int64_t number) {
  const std::lock_guard lock(kept().mutex);
  const auto found = kept().lists.find(number);
  SLMOPS_CHECK(found != kept().lists.end(), op, ": expected the number of a list that _keep has, ",
               "got ", number);
  return found->second;
}

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def("_keep(Tensor[] tensors) -> int");
  m.def("_drop(int number) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CompositeExplicitAutograd, m) {
  m.impl("_keep", TORCH_BOX(&keep));
  m.impl("_drop", TORCH_BOX(&drop));
}

}  // namespace slmops
