# moue-dist in a few commands; `make` alone explains them. Needs Python 3.11 or newer with venv, nothing else.

PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= configs/tiny.yaml
ARGS   ?=
# Files go to workers as tests/conftest.py says; make test ARGS="-n 0" runs them in one process, one after the other.
WORKERS := -n logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check --quiet
BASE := $(VENV)/.moue-base
DEV  := $(VENV)/.moue-dev
TRITON := triton==3.6.0

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev train test lint format rooms

help:
	@echo 'make train    set up $(VENV) and train $(CONFIG): on every GPU here, or on a few CPU ranks'
	@echo '              make train CONFIG=configs/debug_gpu.yaml ARGS="--train.steps 50"'
	@echo '              A run that has a checkpoint goes on from it. Results: runs/<name>/report.html'
	@echo 'make test     set up the development tools too and run every test that this machine can run'
	@echo '              make test ARGS="-k router"'
	@echo 'make lint     ruff and mypy;  make format  lets ruff rewrite;  make rooms  draws docs/rooms.svg again'
	@echo 'make setup    only the set-up; done again when pyproject.toml or constraints.txt change'
	@echo
	@echo 'Then: $(BIN)/moue --help'
	@echo 'PYTHON=python3.12 picks the interpreter, VENV=... the environment. Packages are the tested versions of'
	@echo 'constraints.txt. pip takes your settings: where it knows an index or a folder (PIP_FIND_LINKS) that has a'
	@echo 'CPU build of torch, that one is taken, which saves gigabytes on a machine without a GPU.'

setup: $(BASE)

setup-dev: $(DEV)

train: $(BASE)
	$(BIN)/moue train $(CONFIG) $(ARGS)

test: $(DEV)
	$(BIN)/python -m pytest -q $(WORKERS) --durations=10 $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

rooms: $(BASE)
	$(BIN)/python -m tests.draw_rooms

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: needs Python 3.11 or newer; name one with make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo 'error: no venv here; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }

$(BASE): pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Setting up $(VENV) ...'
	@$(PIP) install -c constraints.txt -e .
	@touch $@

# A GPU build of torch has brought the triton that belongs to it; a CPU build brings none.
$(DEV): $(BASE)
	@echo 'Adding the development tools ...'
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install $(TRITON)
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
