// The phases of softmax(q k^T * scale + mask) v.
#pragma once
#include <optional>

#include "check.h"
#include "scratch.h"
#include "team.h"

namespace slmops {

/// The mask as the kernel reads it: fields of args, and the owner of its memory.
std::optional<Tensor> set_mask(const char* op, const std::optional<Tensor>& mask,
                               AttentionArgs* args);

/// The cut of the work into items: whole ones, or where they are too few one split of the keys
/// each, merged afterwards.
struct AttentionScratch {
  AttentionScratch(const AttentionArgs& args, int64_t workers, Scratch* scratch);
  /// Makes `args`, of the same sizes, work so.
  void apply(AttentionArgs* args) const;

  int64_t block, blocks, splits;
  float* parts;
  WorkerScratch own;
};

/// A phase.
void run_attention(Worker* worker, const AttentionArgs& args, const AttentionScratch& scratch);
/// What remains of rows [begin, end), [batch][queries][heads], after it.
void merge_splits(const KernelTable& table, const AttentionArgs& args, int64_t begin, int64_t end);

}  // namespace slmops
