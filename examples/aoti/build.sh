#!/usr/bin/env bash
# Builds examples/aoti/main.cpp against the torch of a Python.
#
# usage: examples/aoti/build.sh PYTHON OUTPUT
set -euo pipefail
source=$(dirname "$0")/main.cpp
torch=$("$1" -c 'import torch; print(torch.__path__[0])')
"${CXX:-c++}" -std=c++20 -O2 -Wall -isystem "$torch/include" "$source" -o "$2" \
  -L"$torch/lib" -Wl,-rpath,"$torch/lib" -Wl,--no-as-needed -ltorch_cpu -ltorch -lc10 -ldl
