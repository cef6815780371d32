# The commands of a newcomer, and those of a developer.
#
#   make demo     installs; networks that ship solve a Sudoku and tell a story
#   make train-demo  trains on Shakespeare for about five minutes, and writes
#   make test     installs what the tests need and runs them
#   make lint     ruff and mypy
#   make docs     the documentation site, in docs/_build/html
#
# PYTHON chooses the interpreter: make demo PYTHON=python3.12
# PIP_TORCH chooses where the tests' torch comes from: BUILD.md.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m diffusiongemma.main
DEMO_WORKDIR ?= runs/tiny

.PHONY: demo train-demo install test lint docs clean

demo: install
	$(BIN)/python examples/solve_sudoku.py
	$(RUN) --mode=sample --workdir=stories --max_new_tokens=208 \
	  --prompt="Once upon a time"

train-demo: install
	$(RUN) --config=configs/tiny.py --workdir=$(DEMO_WORKDIR)
	$(RUN) --mode=sample --workdir=$(DEMO_WORKDIR) --max_new_tokens=192 \
	  --prompt="ROMEO."

install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet $(PIP_TORCH) torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) .cache build docs/_build docs/pages *.egg-info
