// Greedy generation by a package of examples/aoti/export.py, without Python.
//
//   run FOLDER OPS_LIBRARY COUNT < FOLDER/prompt.txt
//
// The library of torch_slmops' ops (torch_slmops/_C.abi3.so) registers them with torch when it is
// loaded, and asks the system for the CPU's features; SLMOPS_ISA caps the choice as in Python.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void load_ops(const char* library) {
  if (dlopen(library, RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw std::runtime_error(std::string("cannot load the ops: ") + dlerror());
  }
}

/// The name of the ISA row in use.
std::string isa() {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow("slmops::_isa", "")
      .typed<std::string()>()
      .call();
}

/// The bytes of each token: for each their number, 4 bytes little endian, and the bytes.
std::vector<std::string> read_vocabulary(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<std::string> tokens;
  unsigned char size[4];
  while (file.read(reinterpret_cast<char*>(size), sizeof size)) {
    std::string token(size[0] | size[1] << 8 | size[2] << 16 | uint32_t{size[3]} << 24, '\0');
    file.read(token.data(), static_cast<std::streamsize>(token.size()));
    tokens.push_back(token);
  }
  if (tokens.empty()) throw std::runtime_error("cannot read " + path);
  return tokens;
}

void generate(torch::inductor::AOTIModelPackageLoader& model,
              const std::vector<std::string>& vocabulary, std::vector<int64_t> ids, int64_t count) {
  int64_t position = 0;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t id : ids) std::cout << vocabulary.at(static_cast<size_t>(id));
    std::cout << std::flush;
    const auto length = static_cast<int64_t>(ids.size());
    const at::Tensor input = at::tensor(ids, at::kLong).view({1, length});
    const at::Tensor logits = model.run({input, at::scalar_tensor(position, at::kLong)})[0];
    position += length;
    ids = {logits.argmax(-1).item<int64_t>()};
  }
  std::cout << vocabulary.at(static_cast<size_t>(ids[0])) << std::endl;
}

void run(const std::string& folder, const char* library, int64_t count) {
  load_ops(library);
  torch::inductor::AOTIModelPackageLoader model(folder + "/model.pt2");
  const std::vector<std::string> vocabulary = read_vocabulary(folder + "/vocabulary.bin");
  std::vector<int64_t> ids;
  for (int64_t id; std::cin >> id;) ids.push_back(id);
  if (ids.empty()) throw std::runtime_error("expected the tokens of a prompt on standard input");
  std::cerr << "ISA row " << isa() << "\n";
  const at::NoGradGuard no_gradients;
  generate(model, vocabulary, ids, count);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: " << argv[0] << " FOLDER OPS_LIBRARY COUNT < FOLDER/prompt.txt\n";
    return 2;
  }
  try {
    run(argv[1], argv[2], std::stoll(argv[3]));
  } catch (const std::exception& error) {
    std::cerr << argv[0] << ": " << error.what() << "\n";
    return 1;
  }
  return 0;
}
