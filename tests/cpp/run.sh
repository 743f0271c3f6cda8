#!/bin/bash
# Builds and runs the C++ tests, without torch: `tests/cpp/run.sh` under AddressSanitizer and UndefinedBehaviorSanitizer,
# `tests/cpp/run.sh full` also an optimized build over all 2^32 floats and ten times the cases,
# `tests/cpp/run.sh threads` threads/, what several threads do at once, under ThreadSanitizer,
# `tests/cpp/run.sh static PROGRAM` builds a static program with the rows' objects of the extension, and runs nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."

cxx=${CXX:-c++}
jobs=${MAX_JOBS:-$(nproc)}
# The extension's own build shows the warnings of csrc; beside sanitizers the compiler's are not reliable.
common="-std=c++20 -g1 -w -ffp-contract=off -fno-fast-math"
sanitizers="-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
# Checks as calls: inlined, they make g++ take minutes for a row.
if ! "$cxx" --version | grep -q clang; then
  sanitizers+=" --param asan-instrumentation-with-call-threshold=0"
fi

# idle FEATURE...: flags for a row that this CPU lacks a feature of. It is linked, but does not run.
idle() {
  local feature
  for feature; do
    grep -qw "$feature" /proc/cpuinfo || { echo "-O0 -fno-sanitize=all"; return; }
  done
}

# objects NAME: what is compiled for a build, one "object flags source" a line.
objects() {
  local avx2="-mavx2 -mfma -mf16c" source
  local avx512="$avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"
  echo "row_scalar.o csrc/isa/scalar.cpp"
  if [[ $(uname -m) == x86_64 ]]; then
    echo "row_avx2.o $avx2 csrc/isa/avx2.cpp"
    echo "row_avx_vnni.o $avx2 -mavxvnni $(idle avx_vnni) csrc/isa/avx_vnni.cpp"
    echo "row_avx512_vnni.o $avx512 $(idle avx512_vnni) csrc/isa/avx512_vnni.cpp"
    echo "row_avx512_bf16.o $avx512 -mavx512bf16 $(idle avx512_bf16) csrc/isa/avx512_bf16.cpp"
    echo "row_amx.o $avx512 -mamx-tile -mamx-int8 $(idle amx_tile amx_int8) csrc/isa/amx.cpp"
  fi
  local sources=(csrc/isa/isa.cpp csrc/pack/*.cpp)
  if [[ $1 == threads ]]; then
    sources+=(tests/cpp/testing.cpp tests/cpp/threads/main.cpp)
  else
    sources+=(tests/cpp/*.cpp)
    if [[ $(uname -m) == x86_64 ]]; then
      echo "avx_vnni_emulated.o $avx2 tests/cpp/x86/avx_vnni_emulated.cpp"
      echo "avx_vnni_reencoded.o $avx2 -mavxvnni tests/cpp/x86/avx_vnni_reencoded.cpp"
    fi
  fi
  for source in "${sources[@]}"; do
    source_name=${source%.cpp}
    echo "${source_name//\//_}.o $source"
  done
}

# compile NAME FLAGS: the objects that are older than any source.
compile() {
  local dir=tests/cpp/build/$1 flags=$2 object rest
  mkdir -p "$dir"
  objects "$1" | while read -r object rest; do
    if [[ -f $dir/$object ]] &&
      [[ -z $(find csrc tests/cpp -path '*/build' -prune -o -type f -newer "$dir/$object" -print -quit) ]]; then
      continue
    fi
    if [[ $object == *_reencoded.o ]]; then
      # Without the prefix that asks for VEX the assembler takes the EVEX form of an instruction.
      asm=$dir/${object%.o}.s
      echo "$cxx $common $flags -S -o $asm $rest && sed -i 's/{vex}//' $asm && $cxx -c -o $dir/$object $asm"
    else
      echo "$cxx $common $flags -c -o $dir/$object $rest"
    fi
  done | xargs -r -P "$jobs" -d '\n' -n 1 bash -c
}

# build NAME FLAGS: the objects and the program.
build() {
  local dir=tests/cpp/build/$1 flags=$2
  compile "$1" "$flags"
  # shellcheck disable=SC2086
  $cxx $flags -o "$dir/tests" "$dir"/*.o
}

if [[ ${1:-} == static ]]; then
  compile static "-O1"
  rm -f tests/cpp/build/static/row_*.o
  $cxx -static -o "$2" tests/cpp/build/static/*.o build/objects/*/csrc/isa/*.o
  exit
fi
if [[ ${1:-} == threads ]]; then
  build threads "-O1 -fsanitize=thread -fno-omit-frame-pointer -Itests/cpp/threads -pthread"
  TSAN_OPTIONS=halt_on_error=1 tests/cpp/build/threads/tests
  exit
fi
build sanitized "$sanitizers"
tests/cpp/build/sanitized/tests
if [[ ${1:-} == full ]]; then
  build optimized "-O2"
  tests/cpp/build/optimized/tests full
fi
