# make quickstart   set up .venv, then show the whole story on a small real model   (ARGS=--json for machines)
# make test         set up .venv, then run all tests                                (ARGS="-m 'not real'" for the fast ones)
#
# PYTHON=python3.12     the interpreter to use, 3.11 to 3.13
# TORCH_INDEX=ADDRESS   the package index to take PyTorch from. On Linux without an NVIDIA GPU, PyTorch's own CPU index
#                       gives a far smaller download than the default one; everywhere else leave it out.

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' constraints.txt)

.DELETE_ON_ERROR:
.PHONY: setup quickstart test coverage lint format types wheel clean

quickstart: $(READY)
	@$(BIN)/saeguard quickstart $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest $(ARGS)

coverage: $(READY)
	@$(BIN)/python -m pytest --cov $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(READY)
	$(BIN)/mypy --strict src

wheel: $(READY)
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist htmlcov .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache

setup: $(READY)

# What pip prints goes to stderr, so that `make quickstart ARGS=--json` prints one JSON object and nothing else.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("saeguard needs Python 3.11 to 3.13: make PYTHON=python3.12 …")'
	@$(PYTHON) -m venv $(VENV)
	@if [ -z "$(TORCH_INDEX)" ] && [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	    echo "No NVIDIA GPU here. If the download of PyTorch is large, see TORCH_INDEX in the Makefile." >&2; fi
	@$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH) >&2
	@$(BIN)/python -m pip install -c constraints.txt -e '.[dev]' >&2
	@touch $@
