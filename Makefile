# Each target does its own set-up: .venv is made once, reused after, and made again when
# pyproject.toml changes. A set-up that breaks off leaves no stamp, and the next call starts over.
#
#   make PYTHON=/path/to/python3.12 test    takes another interpreter for the set-up.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu sanitize lint format aot

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet
PYTHON ?= $(shell for python in python3 python3.12 python3.13 python3.14; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; \
	then echo $$python; break; fi; done)

# The pyright wheel brings its own JavaScript and the extra pyright[nodejs] its own node, so that
# linting downloads nothing; these settings would make it look elsewhere.
unexport PYRIGHT_PYTHON_FORCE_VERSION PYRIGHT_PYTHON_PYLANCE_VERSION PYRIGHT_PYTHON_NODE_VERSION
unexport PYRIGHT_PYTHON_USE_BUNDLED_PYRIGHT PYRIGHT_PYTHON_NODEJS_WHEEL
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export PYTHONNOUSERSITE := 1

help:
	@echo "make demo       private memories on real records: table and figure, under 3 minutes"
	@echo "make test       lint, then every test that is not slow, under 20 minutes on 2 cores"
	@echo "make test-slow  the long statistical tests"
	@echo "make test-gpu   the tests that need an NVIDIA GPU, with the machine's own python3"
	@echo "make sanitize   compute-sanitizer over the kernels, on an NVIDIA GPU, about a minute"
	@echo "make aot        the kernels compiled for an H200 without a GPU"
	@echo "make lint       ruff (lint and format) and pyright"
	@echo "make format     let ruff rewrite what it can"

demo: $(VENV)/.made-demo
	$(RUN) experiments/private_memory.py

test: lint
	$(RUN) -m pytest -n 2 -m "not slow and not gpu" --durations=10

test-slow: $(VENV)/.made-test
	$(RUN) -m pytest -n 2 -m "slow and not gpu" --durations=10

test-gpu:
	JAX_PLATFORMS=cuda,cpu python3 -m pytest -m gpu

sanitize:
	python3 -m tests.pallas.sanitize

lint: $(VENV)/.made-test
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyright

format: $(VENV)/.made-test
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

# pip may break off half-way through a package: the stamps go first and come back last.
$(VENV)/.made-demo: pyproject.toml .python-version
	@if [ -z "$(PYTHON)" ]; then \
		echo "dpfa_jax needs Python 3.12 or newer; python3 here is" \
			"$$(python3 --version 2>&1 || true). Install one, or say" \
			"make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; fi
	@if [ "$(PYTHON)" = python3.12 ] || [ "$(PYTHON)" = python3.13 ] || [ "$(PYTHON)" = python3.14 ]; then \
		echo "python3 is not 3.12 or newer: taking $(PYTHON)."; fi
	@echo "Setting up $(VENV) with $$($(PYTHON) --version) (once, takes a minute or two)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.made-test: $(VENV)/.made-demo
	@echo "Adding what the tests need to $(VENV) (once, takes a minute or two)"
	@rm -f $(VENV)/.made-demo
	@$(PIP) --editable '.[test]'
	@touch $(VENV)/.made-demo $@

# The kernels compiled for an H200 without a GPU, in an environment of their own. Fails where one
# spills more registers, takes more detours in its loops, or a call holds more memory, than the
# tables in experiments/compile_kernels.py allow.
aot: $(VENV)-aot/.made
	PYTHONPATH=. JAX_PLATFORMS=cpu $(VENV)-aot/bin/python experiments/compile_kernels.py

$(VENV)-aot/.made: pyproject.toml
	@echo "Setting up $(VENV)-aot (once, takes some minutes)"
	@rm -rf $(VENV)-aot
	@$(PYTHON) -m venv $(VENV)-aot
	@$(VENV)-aot/bin/python -m pip --disable-pip-version-check install --quiet \
		jax==0.11.2 jaxtyping numpy scipy
	@$(VENV)-aot/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
		jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 nvidia-cuda-nvcc nvidia-nvvm \
		nvidia-cuda-nvdisasm
	@touch $@
