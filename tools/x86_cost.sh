#!/usr/bin/env bash
# Predicted cycles of linear's inner loops on CPUs that are not here: the table of
# docs/performance.md, by llvm-mca. The peak of 4 rows is 64 multiply-adds a cycle.
#
# usage: tools/x86_cost.sh [model]; needs llvm-mca-19 (Debian: llvm-19), or another in MCA
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-alderlake} mca=${MCA:-llvm-mca-19}

declare -A flags=([avx_vnni]="-mavxvnni" [avx2]="")
for row in avx_vnni avx2; do
  # The flags of setup.py that the order of instructions depends on.
  # shellcheck disable=SC2086
  ${CXX:-g++} -std=c++20 -O3 -w -ffp-contract=off -mavx2 -mfma -mf16c ${flags[$row]} \
    -fno-tree-ter -fno-tree-reassoc -fno-schedule-insns2 -fno-exceptions -fno-rtti \
    -DSLMOPS_ISA=$row -DSLMOPS_DOTS="\"../csrc/simd/${row}_dots.h\"" -S -o - tools/x86_cost.cpp |
    "$mca" -mcpu="$model" -iterations=300 -instruction-info=0 -resource-pressure=0 |
    awk -v row="$row" -v model="$model" '
      /Code Region/ { format = $(NF - 1); rows = $NF }
      /^Iterations:/ { iterations = $2 }
      /^Total Cycles:/ { cycles = $3 / iterations }
      /^Block RThroughput:/ {
        k["int4"] = 32; k["int8"] = 16; k["sub16"] = 64
        outputs = rows == 1 ? 32 : 16
        products = rows * outputs * k[format]
        printf "%s %s %s rows=%s: %.1f multiply-adds a cycle", model, row, format, rows, products / cycles
        printf ", %.1f cycles per 64 weights (%.1f at best)\n", cycles * 64 * rows / products, $3 * 64 * rows / products
      }'
done
