# Everything goes through here. `make demo` and `make test` need python3 (3.11 or newer) and nothing
# else: they make .venv and install into it by themselves.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
STAMP := $(VENV)/.installed
TORCH_VERSION ?= 2.13.0
SEED ?= 0
WORLD ?= mesh
OSERVE_CONFIG ?= deploy/topologies/laptop.toml

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test check static mesh sim bench test-gpu fmt clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## .venv with everything in it

$(STAMP): pyproject.toml
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "python3 -m venv failed; on Debian: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(MAKE) --no-print-directory torch
	@$(VENV)/bin/pip install -q -e '.[torch,report,dev]' 2> $(VENV)/install.log || { \
	  cat $(VENV)/install.log >&2; exit 1; }
	@touch $@

# Plain `torch` from PyPI brings gigabytes of CUDA libraries on Linux. Without an NVIDIA GPU they are
# of no use, so take the CPU build, which is its own version ("+cpu"): from where pip is configured to
# look, else from PyTorch's index, and only if neither has it the big one.
.PHONY: torch
torch:
	@if $(VENV)/bin/python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))'; \
	then :; \
	elif nvidia-smi >/dev/null 2>&1 || [ "$$(uname -s)" != Linux ]; then \
	  $(VENV)/bin/pip install -q torch; \
	else \
	  $(VENV)/bin/pip install -q 'torch==$(TORCH_VERSION)+cpu' 2>/dev/null \
	  || $(VENV)/bin/pip install -q 'torch==$(TORCH_VERSION)+cpu' \
	       --extra-index-url https://download.pytorch.org/whl/cpu \
	  || $(VENV)/bin/pip install -q torch; \
	fi

demo: $(STAMP) ## A mesh, two minutes of a trace, a worker killed in the middle
	@python -m deploy.demo

check: static ## Format, lint, types, imports; unit, property and simulated tests
	@OMP_NUM_THREADS=1 python -m pytest -q tests/unit tests/property tests/simulated

test: static ## check, then all tests: also those that start, and kill, whole meshes
	@OMP_NUM_THREADS=1 python -m pytest -q -m 'not gpu' tests

static: $(STAMP)
	@ruff format --check -q .
	@ruff check -q .
	@pyright
	@lint-imports

test-gpu: $(STAMP) ## Tests that need an NVIDIA GPU
	@if nvidia-smi -L; then OMP_NUM_THREADS=1 python -m pytest -q -m gpu tests/gpu; \
	else echo "test-gpu: skipped, there is no NVIDIA GPU (nvidia-smi finds none)"; fi

mesh: $(STAMP) ## Every service of the Procfile under honcho, on nats://127.0.0.1:4222
	@test -f .oserve/models/tiny/config.json || oserve make-model .oserve/models/tiny --size tiny
	@OSERVE_CONFIG=$(OSERVE_CONFIG) honcho start || [ $$? -eq 130 ] # Ctrl-C is how it ends

sim: $(STAMP) ## Meshes under faults: make sim SEEDS=5000, one: SEED=123; WORLD=mesh, switch or calm
	@python -m loadgen.simulator --world $(WORLD) --seed $(SEED) $(if $(SEEDS),--runs $(SEEDS) --quiet)

bench: $(STAMP) ## Every benchmark, as JSON
	@python -m loadgen.bench

fmt: $(STAMP) ## Format, and fix what ruff can
	@ruff format .
	@ruff check --fix .

clean: ## Remove what make and the mesh made, .venv too
	@rm -rf $(VENV) .oserve .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@rm -rf build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
