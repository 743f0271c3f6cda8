// Calls of the int4 products of KleidiAI in torch's AArch64 library, for tools/arm/cost.py to count
// their instructions: `peer NAME M GROUP [NAME M GROUP ...]`, each a tile of 32 outputs, K = 1024.
//
// They take rows and weights that were packed before, which are zeros here: what is executed does
// not depend on them.
#include <dlfcn.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr size_t kN = 32, kK = 1024;

using Kernel = void (*)(size_t m, size_t n, size_t k, size_t group, const void* rows,
                        const void* weights, float* out, size_t row_bytes, size_t column_bytes,
                        float least, float most);

}  // namespace

int main(int count, char** words) {
  void* library = dlopen("libtorch_cpu.so", RTLD_LAZY);
  if (library == nullptr) {
    std::printf("%s\n", dlerror());
    return 1;
  }
  for (int i = 1; i + 2 < count; i += 3) {
    const auto kernel = reinterpret_cast<Kernel>(dlsym(library, words[i]));
    if (kernel == nullptr) {
      std::printf("no %s\n", words[i]);
      return 1;
    }
    std::printf("%zx\n", reinterpret_cast<size_t>(kernel));
    const size_t m = std::strtoull(words[i + 1], nullptr, 10);
    // A row takes its codes, a scale and a zero point; weights their nibbles, scales and sums.
    std::vector<char> rows(m * (kK + 64)), weights(kN * kK);
    std::vector<float> out(m * kN);
    kernel(m, kN, kK, std::strtoull(words[i + 2], nullptr, 10), rows.data(), weights.data(),
           out.data(), kN * sizeof(float), sizeof(float), -1e30f, 1e30f);
  }
  return 0;
}
