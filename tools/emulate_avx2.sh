#!/usr/bin/env bash
# Runs a selection of the tests on an emulated Haswell: AVX2, FMA, F16C and nothing above. An
# instruction above that level ends the process, which a capped row on a newer CPU would not show.
#
# usage: tools/emulate_avx2.sh PYTHON [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift

if ! command -v qemu-x86_64-static >/dev/null; then
  as_root=()
  [ "$(id -u)" = 0 ] || as_root=(sudo)
  "${as_root[@]}" apt-get update -q
  "${as_root[@]}" apt-get install -q -y --no-install-recommends qemu-user-static
fi

# Features that Haswell has and the emulator lacks are switched off: nothing uses them, and each
# would be a warning.
cpu=Haswell,-pcid,-x2apic,-tsc-deadline,-hle,-invpcid,-rtm
emulated=(qemu-x86_64-static -cpu "$cpu" "$python")

unset SLMOPS_ISA
rows=$("${emulated[@]}" -c 'import torch_slmops; print(*torch_slmops.isas())')
if [ "$rows" != "avx2 scalar" ]; then
  echo "expected the rows 'avx2 scalar' on an emulated Haswell, got '$rows'" >&2
  exit 1
fi

if [ $# = 0 ]; then
  # New processes would run on the real CPU, so tests that start one are left out.
  dispatch='test_dispatch and not environment and not library'
  set -- tests/test_dispatch.py tests/test_ops.py \
    -k "($dispatch) or (test_op_equals_reference and avx2)"
fi
"${emulated[@]}" -m torch_slmops selfcheck --threads 1
exec "${emulated[@]}" -m pytest -p no:cacheprovider "$@"
