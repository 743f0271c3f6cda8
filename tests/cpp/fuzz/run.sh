#!/bin/bash
# Builds the fuzzer of packed weights with clang's libFuzzer, under AddressSanitizer and UndefinedBehaviorSanitizer, and lets it
# run: `tests/cpp/fuzz/run.sh [SECONDS [SEED]]`, by default 30 seconds and another seed each time. What it finds is kept in
# tests/cpp/build/fuzz/, and so is its corpus.
#
# clang is CXX if that is one, else the newest on PATH, else Debian's clang-16, which is installed where apt-get may. Where there
# is none, it says so and ends with 0; with SLMOPS_FUZZ=required that is an error.
set -euo pipefail
cd "$(dirname "$0")/../../.."

seconds=${1:-30} seed=${2:-0}
dir=tests/cpp/build/fuzz
mkdir -p "$dir/corpus"

# has_fuzzer COMPILER: whether it is a clang++ with the library.
has_fuzzer() {
  command -v "$1" >/dev/null && "$1" --version | grep -q clang &&
    "$1" -fsanitize=fuzzer -x c++ -o "$dir/probe" - 2>/dev/null <<<'#include <cstdint>
      #include <cstddef>
      extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t) { return 0; }'
}

find_clang() {
  local name
  for name in "${CXX:-}" clang++ $(compgen -c clang++- | grep -x 'clang++-[0-9]*' | sort -rVu); do
    if [[ -n $name ]] && has_fuzzer "$name"; then
      echo "$name"
      return
    fi
  done
}

clang=$(find_clang)
if [[ -z $clang ]] && command -v apt-get >/dev/null && [[ $(id -u) == 0 ]]; then
  echo "no clang with libFuzzer here: installing Debian's clang-16"
  { apt-get -q update && apt-get -q install -y --no-install-recommends clang-16 libclang-rt-16-dev; } \
    >"$dir/install.log" 2>&1 || tail -n 3 "$dir/install.log"
  clang=$(find_clang)
fi
if [[ -z $clang ]]; then
  echo "SKIPPED: the fuzzer of packed weights needs clang++ with libFuzzer (Debian: clang-16 and libclang-rt-16-dev), found none"
  [[ ${SLMOPS_FUZZ:-} != required ]]
  exit
fi

flags="-std=c++20 -O1 -g1 -w -ffp-contract=off -fno-fast-math -fno-omit-frame-pointer"
flags+=" -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all"
program=$dir/packed
if [[ ! -f $program || -n $(find csrc/pack csrc/kernels csrc/simd csrc/isa tests/cpp/fuzz -newer "$program" -print -quit) ]]; then
  # shellcheck disable=SC2086
  "$clang" $flags -o "$program" tests/cpp/fuzz/packed.cpp csrc/isa/scalar.cpp csrc/pack/*.cpp
fi
"$program" -max_total_time="$seconds" -seed="$seed" -max_len=16384 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 \
  -artifact_prefix="$dir/found-" "$dir/corpus" 2>"$dir/log" || {
  tail -n 60 "$dir/log"
  exit 1
}
grep -E 'stat::(number_of_executed_units|new_units_added)|DONE' "$dir/log"
