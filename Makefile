# make run    sets everything up and serves the bundled model on http://127.0.0.1:8000 (PORT=..., HOST=...)
# make test   sets everything up and runs the tests
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test test-all check bench gpu-check clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile
	@echo "make test-all | check | bench | gpu-check | clean"

# Two stamps: serving needs no torch, everything else does. Each is made again when pyproject.toml changes.
$(VENV)/serve: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "limner needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/dev: pyproject.toml | $(VENV)/serve
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

run: $(VENV)/serve
	$(BIN)/limner serve --host $(HOST) --port $(PORT)

test: $(VENV)/dev
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(VENV)/dev
	$(BIN)/python -m pytest -m "not gpu"

check: $(VENV)/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python && $(BIN)/lint-imports

bench: $(VENV)/dev
	$(BIN)/python -m bench.masks --write docs/benchmarks/masks.md
	$(BIN)/python -m bench.cpu --write docs/benchmarks/cpu.md
	$(BIN)/python -m bench.serving --write docs/benchmarks/serving.md

# On a GPU machine, from the checkout, with whatever torch is there: nothing is installed.
gpu-check:
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests/gpu

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
