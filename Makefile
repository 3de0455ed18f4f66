# One entry point for everything. `make demo` and `make test` need Python 3.11 or later, make and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GOLDENS := .venv-goldens

.DEFAULT_GOAL := help
.PHONY: help install node demo test test-all lint types imports buf format protos api goldens bench quality models clean test-gpu sanitize-gpu bench-gpu

help:  ## Show what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml hatch_build.py generate_protos.py $(wildcard protos/mxgpt/v1/*.proto)
	@echo "installing mxgpt and what it needs into $(VENV), which may take a minute"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(VENV)/.installed-peers: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,peers,fuzz]'
	@touch $@

$(VENV)/.installed-cuda: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda,dev]'
	@touch $@

install: $(VENV)/.installed  ## Make .venv and install mxgpt into it

node:  ## Install what the client in Node needs, where there is npm
	@if command -v npm > /dev/null; then cd examples/node && npm ci --ignore-scripts --no-audit --no-fund --loglevel error; \
	else echo "npm is not installed: tests of the client in Node will be skipped"; fi

demo: $(VENV)/.installed  ## Serve the demo model and stream answers to a few prompts
	$(BIN)/python -m mxgpt.demo

test: $(VENV)/.installed-dev lint types imports buf  ## Lint, types, import contracts and the fast tests
	$(BIN)/python -m pytest -m 'not slow' -n 2

test-all: $(VENV)/.installed-peers node lint types imports buf  ## The same with the slow tests: fuzzing, load, peers
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

buf: $(VENV)/.installed-dev
	$(BIN)/buf lint

format: $(VENV)/.installed-dev  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/.installed-dev  ## Generate mxgpt/v1 from protos/
	$(BIN)/python generate_protos.py

api: $(VENV)/.installed-dev  ## Write docs/api.md anew from protos/
	$(BIN)/python generate_api.py

bench: $(VENV)/.installed-peers  ## Measure the CPU backend beside llama.cpp
	$(BIN)/python -m benchmarks.bench_cpu

test-gpu: $(VENV)/.installed-cuda  ## The tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -n 0 tests/test_cuda_*.py

sanitize-gpu: $(VENV)/.installed-cuda  ## The tests of kernels under compute-sanitizer's memcheck, racecheck and initcheck
	for tool in memcheck racecheck initcheck; do \
	compute-sanitizer --tool $$tool --error-exitcode 9 $(BIN)/python -m pytest -n 0 --timeout 0 tests/test_cuda_ops.py || exit 1; done

bench-gpu: $(VENV)/.installed-cuda  ## Measure kernels, steps, loading and serving on a GPU, with gpt-oss-20b's shape
	$(BIN)/python -m benchmarks.bench_cuda
	$(BIN)/python -m benchmarks.bench_load_cuda
	$(BIN)/python -m benchmarks.bench_served_cuda
	$(BIN)/python -m benchmarks.bench_attention
	$(BIN)/python -m benchmarks.bench_divergence --device cuda:0

quality: $(VENV)/.installed-dev  ## Measure what each type costs the demo models, as docs/mxfp4.md shows
	$(BIN)/python -m benchmarks.quality --picture docs/mxfp4.svg

goldens:  ## Make the golden logits again with Hugging Face transformers, in an environment of its own
	$(PYTHON) -m venv $(GOLDENS)
	$(GOLDENS)/bin/python -m pip install --quiet torch transformers gguf numpy
	$(GOLDENS)/bin/python tests/make_goldens.py

clean:  ## Remove environments and generated code
	rm -rf $(VENV) $(GOLDENS) mxgpt/v1 examples/node/node_modules
