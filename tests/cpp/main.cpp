// Runs the C++ tests: `tests [full]`. A full run takes all 2^32 floats for conversions and
// activations, and ten times the cases.
#include <string>

#include "testing.h"

int main(int argc, char** argv) {
  using namespace slmops::testing;
  const bool full = argc > 1 && std::string(argv[1]) == "full";
  const int cases = full ? 10 : 1;
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
  step("fp_scope", [] { test_fp_scope(); });
  step("convert", [&] { test_convert(full); });
  step("kernels", [&] { test_kernels(300 * cases); });
  step("matrix", [&] { test_matrix(12 * cases); });
  step("tiles", [] { test_tiles(); });
  step("limits", [] { test_limits(); });
  step("activations", [&] { test_activations(full); });
  step("vectors", [&] { test_vectors(1000 * cases); });
  step("fused", [&] { test_fused(500 * cases); });
  step("attention", [&] { test_attention(40 * cases); });
  step("sin_cos", [] { test_sin_cos(); });
  step("quantize_weight", [&] { test_quantize_weight(300 * cases); });
  std::printf("passed\n");
  return 0;
}
