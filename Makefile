# make quickstart | test | lint | bench | test-gpu: each creates the environment in .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help setup quickstart test lint bench test-gpu clean

help:
	@echo "make setup       create $(VENV) and install distllm with its development tools"
	@echo "make quickstart  train a small model on this machine, at most 3 minutes after the install"
	@echo "make test        run the tests"
	@echo "make lint        ruff, mypy, the import floors, shellcheck and hadolint"
	@echo "make bench       time distllm's step against a hand-written loop"
	@echo "make test-gpu    run the tests that need a GPU"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@echo "creating the environment in $(VENV): about a minute, 1.6 GB"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "distllm needs Python 3.11 or newer; set PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

quickstart: setup
	$(BIN)/distllm train configs/quickstart.yaml

test: setup
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest -m deepspeed tests/engine tests/verify tests/bench tests/train

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run launch/*.sh launch/*.sbatch
	$(BIN)/hadolint docker/Dockerfile

bench: setup
	$(BIN)/python docs/benchmarks/overhead.py

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) build dist *.egg-info
