// Panels of a packed weight, unpacked to bf16 (fp32 where the CPU has no bf16 dots) and multiplied
// by torch.
#include "library.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <atomic>

#include "parallel.h"

namespace slmops {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr int64_t kPanelBytes = 4 << 20;
constexpr int64_t kSlabBytes = 64 << 20;
constexpr int64_t kExpandCost = 8;  // of a weight, in multiply-adds

// Where torch's product overtakes ours, on 2 cores of Zen 4. Beside bf16 kernels: int8 between 64
// and 128 rows of a model; int4 never by more than 10 %, which the ops that are left for it cost.
// In the place of `avx2`'s kernels at 16 rows; near 64 (an estimate) where the panels are fp32.
constexpr int64_t kNever = int64_t{1} << 40, kRowsInt8 = 96, kRowsOfFloat = 16, kRowsOfFloat32 = 64;
std::atomic<int64_t> tuned_int4{0}, tuned_int8{0};

Tensor reordered(const Tensor& x, const Tensor& perm) {
  std::array<StableIValue, 3> stack{from(x), from(x.dim() - 1), from(perm)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

/// x as [m, k] of `type`.
Tensor plain_rows(const Tensor& x, int64_t k, const std::optional<Tensor>& perm, ScalarType type) {
  Tensor rows = torch::stable::reshape(perm.has_value() ? reordered(x, *perm) : x, {-1, k});
  if (rows.scalar_type() == type) return to_contiguous(rows);
  Tensor converted = new_tensor({rows.size(0), k}, type);
  return torch::stable::copy_(converted, rows);
}

/// out = a b + bias, bias of the type of the others.
void multiply(Tensor& out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  if (bias.has_value()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

}  // namespace

bool by_library(const Format& f, int64_t rows) {
  if (!is_fast(f)) return false;
  const int64_t tuned = (f.bits == 4 ? tuned_int4 : tuned_int8).load(std::memory_order_relaxed);
  if (tuned > 0) return rows >= tuned;
  const bool tiles = (features() & kAmxBf16) != 0;  // which torch uses, and our kernels do not
  if (!tiles && fast_kernels(current()) != nullptr) {
    return rows >= (f.bits == 4 ? kNever : kRowsInt8);
  }
  return rows >= (has_bf16() ? kRowsOfFloat : kRowsOfFloat32);
}

int64_t library_slab_rows(int64_t row_bytes) {
  return std::max<int64_t>(1, kSlabBytes / row_bytes);
}

Tensor library_linear(const Tensor& x, const Format& f, const uint8_t* packed,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& perm,
                      ScalarType out_type) {
  const DType type = has_bf16() ? DType::bf16 : DType::f32;
  Tensor out = new_rows(x, f.n, out_type);
  const Tensor a = plain_rows(x, f.k, perm, scalar_type(type));
  Tensor rows = torch::stable::view(out, {a.size(0), f.n});
  std::optional<Tensor> plain_bias;
  if (bias.has_value()) {
    Tensor converted = new_tensor({f.n}, scalar_type(type));
    plain_bias = torch::stable::copy_(converted, *bias);
  }
  const int64_t most = std::max<int64_t>(1, kPanelBytes / (f.k * kTile * size_of(type)));
  const int64_t tiles = std::min(most, f.tiles);
  Tensor panel = new_tensor({f.k, tiles * kTile}, scalar_type(type));
  const KernelTable& table = kernels();
  for (int64_t tile = 0; tile < f.tiles; tile += tiles) {
    const int64_t count = std::min(tiles, f.tiles - tile), n = tile * kTile;
    uint8_t* data = static_cast<uint8_t*>(panel.mutable_data_ptr());
    parallel(count, share_count(count, f.k * kTile * kExpandCost),
             [&](int64_t, int64_t begin, int64_t end) {
               for (int64_t i = begin; i < end; ++i) {
                 table.expand(f, packed, tile + i, type, data + i * kTile * size_of(type),
                              tiles * kTile);
               }
             });
    const int64_t columns = std::min(count * kTile, f.n - n);
    const Tensor b = torch::stable::narrow(panel, 1, 0, columns);
    std::optional<Tensor> part;
    if (plain_bias.has_value()) part = torch::stable::narrow(*plain_bias, 0, n, columns);
    Tensor target = torch::stable::narrow(rows, 1, n, columns);
    if (out_type == scalar_type(type)) {
      multiply(target, a, b, part);
    } else {
      Tensor product = new_tensor({a.size(0), columns}, scalar_type(type));
      multiply(product, a, b, part);
      torch::stable::copy_(target, product);
    }
  }
  return out;
}

namespace {

void set_library_rows(int64_t int4, int64_t int8) {
  SLMOPS_CHECK(int4 >= 0 && int8 >= 0,
               "_set_library_rows: expected numbers of rows, or 0 for the usual one");
  tuned_int4.store(int4);
  tuned_int8.store(int8);
}

bool uses_library(const Tensor& packed, int64_t rows) {
  return by_library(packed_format("_uses_library", packed), rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmops, m) {
  m.def("_set_library_rows(int int4, int int8) -> ()");
  m.def("_uses_library(Tensor packed, int rows) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(slmops, CompositeExplicitAutograd, m) {
  m.impl("_set_library_rows", TORCH_BOX(&set_library_rows));
  m.impl("_uses_library", TORCH_BOX(&uses_library));
}

}  // namespace slmops
