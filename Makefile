# A fresh machine needs Python 3.10 or newer, git and make; everything else goes into .venv.
# Written for make 3.81, which macOS still ships.

PYTHON ?= python3
ARGS ?=
JOBS ?= auto
CASES ?= 2000
FIRST ?= 0

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
UV ?= $(BIN)/uv
OLDEST := .venv-oldest
OLDEST_PYTHON ?= 3.10
OLDEST_STAMP := $(OLDEST)/.stamp
NEWEST := .venv-newest
NEWEST_STAMP := $(NEWEST)/.stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo test fuzz test-oldest test-newest bench docs figures lint format build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv with the reference set (PYTHON=python3.11 picks the interpreter)

demo: setup ## run the demo (ARGS="--fast")
	$(BIN)/lightning-unlearn demo $(ARGS)

# A file's tests go to one process, since they share what is slow to make. Bytecode is written also where the
# environment forbids it, or each of the processes that they start would compile PyTorch and Lightning again.
test: setup ## run the tests and doctests (ARGS="-k mixture", JOBS=1)
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n $(JOBS) --maxprocesses 8 --dist loadfile $(ARGS)

test-oldest: $(OLDEST_STAMP) ## run them with the oldest versions that are supported (ARGS="-k mixture", UV=uv)
	PYTHONDONTWRITEBYTECODE= $(OLDEST)/bin/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile $(ARGS)

# What is newest changes from day to day: NEWEST is made again where its stamp is gone.
test-newest: $(NEWEST_STAMP) ## run them with the newest versions that there are (ARGS="-k mixture", UV=uv)
	PYTHONDONTWRITEBYTECODE= $(NEWEST)/bin/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile $(ARGS)

# The suite runs the first 80.
fuzz: setup ## run random fits (CASES=2000 FIRST=0: from seed FIRST on)
	PYTHONDONTWRITEBYTECODE= FUZZ_CASES=$(CASES) FUZZ_FIRST=$(FIRST) $(BIN)/pytest -n $(JOBS) --maxprocesses 8 tests/test_fuzz.py $(ARGS)

bench: setup ## measure the partition on real data (ARGS="--data DIR --only spoken-sym40 --seeds 1")
	$(BIN)/python -m benchmarks.partition $(ARGS)

docs: setup ## build the documentation into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -b html -q -W --keep-going docs docs/_build/html

figures: setup ## make the documentation's figures from the demo (about a minute)
	$(BIN)/python docs/figures.py

lint: setup ## check style, types and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell

format: setup ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

build: setup ## build sdist and wheel into dist/
	rm -rf dist
	$(BIN)/python -m build

clean: ## remove what the tools leave behind; .venv, .venv-oldest and .venv-newest stay
	rm -rf build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path "./$(VENV)*" -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The stamp is written last, so that an interrupted set-up starts again.
# pip is the last thing `venv` installs: with it there, the environment is complete.
# --python, because an active conda or virtual environment would otherwise receive the packages.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, got %d.%d: make setup PYTHON=python3.11" % sys.version_info[:2])'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e '.[all,dev,docs]'
	@touch $@

# Lightning by name: it caps packaging and fsspec, and left to itself the resolver raises Lightning instead of them.
# Where there is no such Python and none can be fetched, the one at hand.
$(OLDEST_STAMP): pyproject.toml
	@command -v $(UV) > /dev/null || $(MAKE) setup
	$(UV) venv --clear --python $(OLDEST_PYTHON) $(OLDEST) || $(UV) venv --clear $(OLDEST)
	$(UV) pip install --python $(OLDEST)/bin/python --resolution lowest-direct -e '.[all,dev]' \
	  lightning==2.5.0 pytorch-lightning==2.5.0
	@touch $@

# Without constraints.txt.
$(NEWEST_STAMP): pyproject.toml
	@command -v $(UV) > /dev/null || $(MAKE) setup
	$(UV) venv --clear --python $(PYTHON) $(NEWEST)
	$(UV) pip install --python $(NEWEST)/bin/python --upgrade -e '.[all,dev]'
	@touch $@
