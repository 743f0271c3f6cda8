#!/usr/bin/env bash
# Ops and a model in Python, with real AArch64 torch, on emulated CPUs: what the host computed is checked there on every row that the CPU
# has, and what a CPU computes is checked on the host. The best row of each has to be the one expected. Then products are compared with
# those of the libraries in torch, and selfcheck runs.
#
# usage: tools/arm/python.sh HOST_PYTHON CPU...
set -euo pipefail
cd "$(dirname "$0")/../.."
host=$1
shift
declare -A best=([neoverse-n1]=neon_dotprod [neoverse-v1]=neon_i8mm [max]=neon_i8mm)
mkdir -p .arm/vectors
export TQDM_DISABLE=1

"$host" tests/vectors.py write .arm/vectors/host.pt
for cpu; do
  tools/arm/emulated.sh "$cpu" tests/vectors.py check .arm/vectors/host.pt --row "${best[$cpu]}" --out ".arm/vectors/$cpu.pt"
  "$host" tests/vectors.py check ".arm/vectors/$cpu.pt"
  # Neither -m nor pytest's pythonpath may put this folder, with the host's extension, before the package.
  # New processes would be of the host's CPU, so tests that start one are left out.
  tools/arm/emulated.sh "$cpu" -P -m pytest -o pythonpath= -q -p no:cacheprovider -k 'not environment and not library' \
    tests/test_dispatch.py tests/test_dispatch_arm.py tests/test_arm_peers.py
  tools/arm/emulated.sh "$cpu" -P -m torch_slmops selfcheck
done
