# `make demo` and `make test` need Python 3.11 or newer and nothing else: both first make .venv and install into it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Arguments for the demo or for pytest: make demo ARGS="--steps 50 --blocks 8"; make test ARGS="-k op -x"
ARGS ?=
# The interpreter of `make test-gpu`.
PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
# The interpreter that makes .venv: the first one here that is new enough and can.
BOOTSTRAP ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	"$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$python"; break; }; done)

.PHONY: help install demo test test-slow test-consumers test-oldest-onnxruntime zoo test-gpu check format docs dist-check bench clean

help:
	@echo 'make demo      train a small Llama plain and rewritten, export it; options in ARGS="--steps 50"'
	@echo 'make test      run the tests; options for pytest in ARGS="-k op"'
	@echo 'make test-slow run the tests that take more than a few seconds each'
	@echo 'make test-consumers install what runs exported models beside ONNX Runtime, and run the tests of it'
	@echo 'make test-oldest-onnxruntime export with the oldest ONNX Runtime allowed, and run a file in an older one'
	@echo 'make zoo       rewrite every architecture in tests/zoo and print what was accepted and refused'
	@echo 'make test-gpu  run the tests that need CUDA, with PYTHON=... (now: $(PYTHON))'
	@echo 'make check     ruff, ruff format and mypy --strict'
	@echo 'make format    let ruff rewrite what it can'
	@echo 'make docs      build docs/ to docs/_build/html; a warning is an error'
	@echo 'make dist-check build wheel and sdist, and try the wheel in a clean environment with each extra'
	@echo 'make bench     run benchmarks/'
	@echo 'make clean     remove .venv, caches and builds'

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(BOOTSTRAP)" || { echo "No Python 3.11 or newer with the venv module" \
		"was found; name one: make BOOTSTRAP=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) with $(BOOTSTRAP)"; "$(BOOTSTRAP)" -m venv $(VENV); }
	@echo "Installing into $(VENV) (torch is large: the first time takes some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# It depends on torchvision, which the models that the tests use do not need.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps vit-pytorch
	@touch $@

# Threads that wait asleep: spinning ones stretch every step when something else wants the cores.
demo: export OMP_WAIT_POLICY ?= passive
demo: $(STAMP)
	$(BIN)/attnres demo $(ARGS)

# One thread a worker, and no pool of compile workers beside pytest's own: the cores are taken already.
test test-slow zoo: export OMP_NUM_THREADS ?= 1
test test-slow zoo: export TORCHINDUCTOR_COMPILE_THREADS ?= 1
test: $(STAMP)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m 'not gpu and not zoo and not slow' $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m 'slow and not gpu' $(ARGS)

test-consumers: TARGET = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	--target $(VENV)/consumers
test-consumers: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[consumers]'
	@# Optimum asks for transformers 4, and torchao, which ExecuTorch needs, is used by transformers and peft where they
	@# find it. So they are in folders of their own, over what is installed; and with what running a model needs only.
	$(TARGET)/optimum 'optimum-onnx==0.1.*' 'optimum==2.1.*' 'transformers==4.57.*' 'huggingface-hub<1' 'tokenizers<0.23'
	$(TARGET)/executorch 'executorch==1.5.*' 'torchao==0.18.*' ruamel.yaml tabulate
	@# The scripts would fetch libraries for CUDA.
	@! command -v npm >/dev/null || npm install --silent --no-audit --no-fund --ignore-scripts \
		--prefix $(VENV)/consumers/node onnxruntime-node@1.30 onnxruntime-web@1.30
	$(BIN)/python -m pytest tests/test_onnx_consumers.py tests/test_onnx_kernel.py tests/test_runtimes.py $(ARGS)

# 1.23 is what pyproject.toml asks for; it runs in the place of the installed one. 1.20 is not enough to export with the
# default opset, and has an environment of its own to run a file of opset 21 in.
test-oldest-onnxruntime: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(VENV)/onnxruntime-1.23 'onnxruntime==1.23.*'
	$(BIN)/python -m venv $(VENV)/onnxruntime-1.20
	$(VENV)/onnxruntime-1.20/bin/python -m pip install --quiet --disable-pip-version-check 'onnxruntime==1.20.*' numpy
	PYTHONPATH=$(VENV)/onnxruntime-1.23 ATTNRES_OLDEST_ONNXRUNTIME=$(VENV)/onnxruntime-1.20/bin/python \
		$(BIN)/python -m pytest tests/test_onnx.py tests/test_onnx_consumers.py tests/test_onnx_kernel.py -m 'not gpu' $(ARGS)

zoo: $(STAMP)
	$(BIN)/python -m pytest tests/zoo -n logical --maxprocesses 8 --dist worksteal -p no:logging -m 'not gpu' $(ARGS)

test-gpu:
	@if "$(PYTHON)" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}" "$(PYTHON)" -m pytest -m gpu $(ARGS); \
	else \
		echo "$(PYTHON) has no torch that sees a CUDA device: no GPU test was run (PYTHON=... names another)"; \
	fi

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict attnres_rewrite

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python -m sphinx -q -E -W --keep-going docs docs/_build/html

dist-check: $(STAMP)
	tests/packaging/dist_check.sh

bench: $(STAMP)
	$(BIN)/python benchmarks/op.py
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/phase_one.py
	$(BIN)/python benchmarks/schedule.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/checkpointing.py
	$(BIN)/python benchmarks/onnx.py
	$(BIN)/python benchmarks/quantization.py
	@# The peers are dependencies of this benchmark only.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/plots.py

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache torch_compile_debug
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
