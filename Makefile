# One environment in $(VENV), made once; everything else uses it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: env demo test test-slow check format

env: $(STAMP)

# Plain pip: it takes the torch build that this machine's index or pip settings offer (docs/decisions/001).
$(STAMP): pyproject.toml
	@echo "making the environment $(VENV), a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -qq -e ".[dev]"
	touch $(STAMP)

demo: env
	$(BIN)/vtrial generate cohorts/oncology.csv --n 2

test: env
	$(BIN)/python -m pytest

test-slow: env
	$(BIN)/python -m pytest -m slow

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict vtrial
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
