#!/usr/bin/env bash
# Sets up an engine to compare with, from PyPI, in an environment of its own:
#
#     benchmarks/engines/setup.sh llama.cpp|openvino|onnxruntime [FOLDER]
#
# FOLDER is build/engines unless given. llama.cpp is compiled for this machine, about 12 minutes on
# two cores. transformers and torchao need no set-up: they are in the project's environment after
# `make lint` or `make test`. COMPILER_LAUNCHER, if set, runs each compilation of llama.cpp.
set -euo pipefail

engine=${1:?which engine: llama.cpp, openvino or onnxruntime}
folder=$(realpath -m "${2:-$(dirname "$0")/../../build/engines}")/$engine
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
mkdir -p "$folder"
test -x "$folder/venv/bin/python" || "$python" -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }

# A torch without CUDA where TORCH_INDEX names an index that has one; only conversions need it.
torch() { pip install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==2.13.0"; }

case $engine in
  llama.cpp)
    version=0.3.36
    source=$folder/llama_cpp_python-$version
    pip install -q numpy==2.4.6 gguf==0.19.0 typing-extensions diskcache jinja2 cmake ninja
    if ! test -d "$source"; then
      pip download -q --no-deps --no-binary llama-cpp-python -d "$folder" llama-cpp-python==$version
      tar -xzf "$source.tar.gz" -C "$folder"
    fi
    export PATH="$folder/venv/bin:$PATH"
    launcher=${COMPILER_LAUNCHER:-}
    cmake -S "$source/vendor/llama.cpp" -B "$folder/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
      -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_COMMON=OFF \
      -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
      -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DCMAKE_C_COMPILER_LAUNCHER="$launcher" \
      -DCMAKE_CXX_COMPILER_LAUNCHER="$launcher" > "$folder/cmake.log"
    ninja -C "$folder/build" -j "${MAX_JOBS:-$(nproc)}" llama
    ;;
  openvino)
    torch
    pip install -q openvino-genai==2026.4.1.0 "optimum-intel[nncf]==2.2.0"
    ;;
  onnxruntime)
    torch
    pip install -q onnxruntime-genai==0.18.0 onnx onnx-ir transformers==5.23.0
    ;;
  *)
    echo "no set-up for $engine: llama.cpp, openvino or onnxruntime" >&2
    exit 2
    ;;
esac
echo "$engine is ready in $folder"
