#!/usr/bin/env bash
# Runs the root's Python on an emulated CPU, with torch's AArch64 wheel and the cross-built package, or the one in the folder $PACKAGE.
#
# usage: tools/arm/emulated.sh CPU [python arguments]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
cpu=$1
shift
unset SLMOPS_ISA
export PYTHONPATH=${PACKAGE:-$root/.arm/package}:$root/.arm/site PYTHONNOUSERSITE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
exec "$root/.arm/qemu-aarch64" -L "$root/.arm/root" -cpu "$cpu" "$root/.arm/root/usr/bin/python3.11" "$@"
