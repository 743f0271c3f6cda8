#!/usr/bin/env bash
# Runs the C++ tests of tools/arm/build.py on emulated CPUs of every level and asserts which rows each of them had, best first: a silent
# fall-back fails, and so does an instruction above the level, which ends the process.
#
# usage: tools/arm/levels.sh [CPU...]
set -euo pipefail
cd "$(dirname "$0")/../.."

declare -A rows=(
  [cortex-a72]="scalar"
  [a64fx]="scalar"
  [neoverse-n1]="neon_dotprod scalar"
  [neoverse-v1]="neon_i8mm neon_dotprod scalar"
  [neoverse-n2]="neon_i8mm neon_dotprod scalar"
  [max,sve-default-vector-length=16]="neon_i8mm neon_dotprod scalar"
  [max,sve-default-vector-length=32]="neon_i8mm neon_dotprod scalar"
  [max,sve-default-vector-length=64]="neon_i8mm neon_dotprod scalar"
)
cpus=("$@")
[[ $# != 0 ]] || cpus=("${!rows[@]}")

# run CPU: the program's output, where it failed or ran on other rows, and its end.
run() {
  local cpu=$1 expected=$2 log found
  log=.arm/tests/$cpu.log
  if ! .arm/qemu-aarch64 -cpu "$cpu" .arm/tests/tests >"$log" 2>&1; then
    cat "$log"
    echo "$cpu: failed" >&2
    return 1
  fi
  found=$(sed -n 's/^rows: scalar//p' "$log" | tr -d ';')
  found="${found# }"
  if [[ "${found:+$found }scalar" != "$expected" ]]; then
    echo "$cpu: expected the rows '$expected', got '${found:+$found }scalar'" >&2
    return 1
  fi
  echo "$cpu: $expected: $(tail -n 1 "$log")"
}
export -f run

for cpu in "${cpus[@]}"; do
  printf '%s\0%s\0' "$cpu" "${rows[$cpu]}"
done | xargs -0 -n 2 -P "${MAX_JOBS:-$(nproc)}" bash -c 'run "$1" "$2" || exit 255' _
