// Runs the C++ tests: `tests`, `tests full` or `tests row NAME [unsigned]`.
//
// A full run takes all 2^32 floats for conversions and activations, and ten times the cases. A run
// of one row, for an emulated CPU, takes a fifth of the cases.
#include <string>

#include "testing.h"

int main(int argc, char** argv) {
  using namespace slmops::testing;
  const std::string mode = argc > 1 ? argv[1] : "";
  const bool full = mode == "full", one = mode == "row" && argc > 2;
  if (one) choose_row(argv[2]);
  if (one && argc > 3 && std::string(argv[3]) == "unsigned") fill_without_signs();
  const auto cases = [&](int usual) { return full ? 10 * usual : one ? usual / 5 : usual; };
  std::printf("features: %s\n", slmops::feature_names(slmops::system_features()).c_str());
  std::printf("chosen: %s\n", slmops::select(slmops::system_features(), nullptr)->name);
  std::printf("rows: scalar");
  for (const auto& row : linear_rows()) std::printf("; %s", row.name);
  std::printf("\n");
  const auto step = [](const char* name, const auto& test) {
    std::printf("%s\n", name);
    std::fflush(stdout);
    test();
  };
  step("header", [] { test_header(); });
  step("pack", [] { test_pack(); });
  step("checksum", [] { test_checksum(); });
  step("fp_scope", [] { test_fp_scope(); });
  step("convert", [&] { test_convert(full); });
  step("kernels", [&] { test_kernels(cases(300)); });
  step("matrix", [&] { test_matrix(one ? 12 : cases(12)); });
  step("tiles", [] { test_tiles(); });
  step("limits", [&] { test_limits(one ? 16 : 1); });
  step("activations", [&] { test_activations(full); });
  step("vectors", [&] { test_vectors(cases(1000)); });
  step("fused", [&] { test_fused(cases(500)); });
  step("attention", [&] { test_attention(cases(40)); });
  step("sin_cos", [&] { test_sin_cos(cases(200000)); });
  step("quantize_weight", [&] { test_quantize_weight(cases(300)); });
  std::printf("passed\n");
  return 0;
}
