# `make demo` and `make test` set up everything themselves: Python >= 3.11 and make are all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test quick newest lowest check sanitize docs clean

demo: $(READY)
	$(BIN)/halve demo demo-out --overwrite

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

quick: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

# the tests with the newest, and with the lowest, versions that pyproject.toml allows; PyTorch stays the pinned one
define tested_with
	$(PYTHON) -m venv --clear .venv-$(1)
	$(PYTHON) -m tools.versions $(1) > .venv-$(1)/constraints.txt
	.venv-$(1)/bin/python -m pip install --quiet --constraint .venv-$(1)/constraints.txt '.[dev]'
	OMP_NUM_THREADS=1 .venv-$(1)/bin/python -m pytest -n 2 $(SELECTION)
endef

newest:
	$(call tested_with,newest)

lowest:
	$(call tested_with,lowest)

check: $(READY)
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/ruff format --check src tests benchmarks tools
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m tools.docs --check

sanitize: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.sanitize

docs: $(READY)
	$(BIN)/python -m tools.docs

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-newest .venv-lowest demo-out
