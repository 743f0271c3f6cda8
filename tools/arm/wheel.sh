#!/usr/bin/env bash
# A wheel for AArch64 in dist/. auditwheel has to find that its tag is right, and selfcheck has to pass with it on an emulated CPU.
#
# usage: tools/arm/wheel.sh HOST_PYTHON
set -euo pipefail
cd "$(dirname "$0")/../.."
host=$1
rm -f dist/*_aarch64.whl
"$host" tools/arm/build.py wheel
wheel=$(echo dist/*_aarch64.whl)

"$host" -m pip install -q --no-deps --upgrade --target .arm/auditwheel auditwheel==6.8.2 pyelftools==0.33 packaging==26.3
PYTHONPATH=.arm/auditwheel "$host" -m auditwheel show "$wheel" | tee .arm/auditwheel.txt
# The lines are wrapped.
tag=$(tr '\n' ' ' <.arm/auditwheel.txt | grep -o 'platform tag[^"]*"[^"]*"' | head -n 1 | sed 's/.*"\(.*\)"/\1/')
if [[ $wheel != *-$tag.whl ]]; then
  echo "expected the tag '$tag' that auditwheel finds, got $wheel" >&2
  exit 1
fi

rm -rf .arm/installed
"$host" -m zipfile -e "$wheel" .arm/installed
PACKAGE=.arm/installed tools/arm/emulated.sh max -P -m torch_slmops selfcheck --threads 1
