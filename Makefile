# Everything here is a plain command too; the README lists them.
#   make demo    install into .venv and generate text
#   make test    install into .venv and run the tests
# Another Python:  make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= Explain in two sentences why the sky is blue.

.DEFAULT_GOAL := help
.PHONY: help demo test contract lint results-check clean

help:
	@echo "make demo           set up $(VENV) and generate text with a small model"
	@echo "make test           set up $(VENV) and run the tests"
	@echo "make contract       only the tests of the ops and the model"
	@echo "make lint           ruff, formatting and types"
	@echo "make results-check  name benchmark results that are older than the code"
	@echo "make clean          remove $(VENV), builds and caches"

demo: $(VENV)/.installed
	$(BIN)/jaxdecode generate -p "$(PROMPT)"

# Programs of tests run once, so compiling them well takes longer than it gains.
test contract: export XLA_FLAGS := --xla_backend_optimization_level=0 $(XLA_FLAGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

contract: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "contract and not gpu"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

results-check:
	@$(PYTHON) benchmarks/results_check.py

clean:
	rm -rf $(VENV) build dist jaxdecode.egg-info
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second run start at once; a changed pyproject.toml installs again.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "jaxdecode needs Python 3.11 or newer; '$(PYTHON)' is not." >&2; \
	  echo "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "Installing into $(VENV), once; this takes a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@
