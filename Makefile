# Two commands set everything up: `make run` serves a real model, `make test` runs the tests.
SHELL := /bin/sh
.DEFAULT_GOAL := help
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	if $$p -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info < (3, 14)))' >/dev/null 2>&1; then echo $$p; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: help run test test-fast check chaos bench bench-quick test-vllm fmt generate clean

help: ## Show this help
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/pip.stamp: requirements/bootstrap.txt
	@test -n "$(PYTHON)" || { echo "HelixFlow needs Python 3.11, 3.12 or 3.13: install one, or name it with make PYTHON=/path/to/python3"; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --require-hashes -r requirements/bootstrap.txt
	@touch $@

$(VENV)/runtime.stamp: $(VENV)/pip.stamp requirements/runtime.txt pyproject.toml
	@echo "Installing locked dependencies"
	@$(PIP) install --require-hashes -r requirements/runtime.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp requirements/dev.txt
	@echo "Installing locked test tools"
	@$(PIP) install --require-hashes -r requirements/dev.txt
	@touch $@

run: $(VENV)/runtime.stamp ## Set everything up and serve a real model
	@exec $(BIN)/helixflow serve --welcome

test: $(VENV)/dev.stamp ## Set everything up, run the checks and all tests
	@$(MAKE) --no-print-directory check
	@$(BIN)/python -m pytest tests

test-fast: $(VENV)/dev.stamp ## Unit tests only
	@$(BIN)/python -m pytest tests/unit

test-vllm: $(VENV)/dev.stamp ## A real vLLM on the CPU, set up on the first run (2 GB, 20 minutes); VLLM_PYTHON=… takes yours
	@VLLM_PYTHON="$${VLLM_PYTHON:-$$($(BIN)/python -m tools.vllm_environment)}"; test -n "$$VLLM_PYTHON" && \
		VLLM_PYTHON="$$VLLM_PYTHON" $(BIN)/python -m pytest tests/vllm -s

check: $(VENV)/dev.stamp ## Format, lint, types, layers, generated files
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m tools.generate --check

chaos: $(VENV)/dev.stamp ## The chaos tests at their full length (hours)
	@$(BIN)/python -m pytest tests/chaos --long

bench: $(VENV)/dev.stamp ## Measure speed and memory (see docs/reference/benchmarks.md)
	@$(BIN)/python -m benchmarks

bench-quick: $(VENV)/dev.stamp ## The same, shorter
	@$(BIN)/python -m benchmarks --quick

fmt: $(VENV)/dev.stamp ## Format the code and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

generate: $(VENV)/dev.stamp ## Regenerate protobuf stubs and the generated reference pages
	@$(BIN)/python -m tools.generate

clean: ## Remove the environment and caches (models and data stay)
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis benchmarks/results
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
