# make up · make test — see README.md
SHELL := /bin/bash
BIN := .venv/bin
ARGS ?=

.PHONY: help setup up check test test-system clean

help:
	@echo "make up           set everything up and run a whole cluster on this machine (ARGS='--prefill 2 …')"
	@echo "make test         set everything up, check, and run all tests that need only Python and its packages"
	@echo "make setup        make .venv with the baton command, for the hardware there is"
	@echo "make check        lint, types and import rules"
	@echo "make test-system  the tests that need programs from the system"
	@echo "make clean        remove caches and .venv"

setup:
	@services/launcher/setup.sh

up: setup
	@exec $(BIN)/baton up $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup check
	$(BIN)/python -m pytest $(wildcard tests/unit tests/contract tests/integration tests/fault) $(ARGS)

test-system: setup
	@if ls tests/system/test_*.py >/dev/null 2>&1; then exec $(BIN)/python -m pytest tests/system $(ARGS); \
	else echo "tests/system holds no test yet: nothing needs a program from the system"; fi

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist *.egg-info
	find services shared tests -name __pycache__ -type d -prune -exec rm -rf {} +
