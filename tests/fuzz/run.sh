#!/bin/bash
# The fuzzer of saved models: `tests/fuzz/run.sh PYTHON [SECONDS [SEED]]`, by default 30 seconds and another seed each time.
# atheris goes into build/atheris, where it has a wheel; where it has none (its wheels are for CPython 3.11 to 3.13 on x86-64
# Linux) this says so and ends with 0. With SLMOPS_FUZZ=required that is an error. The corpus, and what the fuzzer finds, stay
# in build/fuzz.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=$1 seconds=${2:-30} seed=${3:-0}
mkdir -p build/fuzz/corpus
export PYTHONPATH=build/atheris PIP_DISABLE_PIP_VERSION_CHECK=1
"$python" -m pip install -q --no-deps --only-binary=:all: --upgrade --target build/atheris atheris==3.0.0 2>build/fuzz/install.log || true
if ! "$python" -c "import atheris" 2>>build/fuzz/install.log; then
  echo "SKIPPED: the fuzzer of saved models needs atheris 3.0.0, which could not be installed: $(tail -n 1 build/fuzz/install.log)"
  [[ ${SLMOPS_FUZZ:-} != required ]]
  exit
fi
"$python" tests/fuzz/saved_model.py -max_total_time="$seconds" -seed="$seed" -timeout=60 -max_len=4096 -len_control=0 -print_final_stats=1 \
  -artifact_prefix=build/fuzz/found- build/fuzz/corpus 2>build/fuzz/log || {
  tail -n 60 build/fuzz/log
  exit 1
}
grep -E 'stat::(number_of_executed_units|new_units_added)|DONE' build/fuzz/log
