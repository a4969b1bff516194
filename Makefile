# make demo   see the whole thing work      make check   format, lint, types, import order
# make test   everything that must be true  make clean   remove what the others made
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
BIN = $(VENV)/bin
EXTRAS = faiss-cpu,train,dev

.PHONY: install check format test clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt $(PIP_ARGS) torch
	$(BIN)/pip install -q -c constraints.txt $(PIP_ARGS) -e ".[$(EXTRAS)]"
	touch $@

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
