# make quickstart   set up .venv, then show the whole story on a small real model   (ARGS=--json for machines)
# make test         set up .venv, then run all tests                                (ARGS="-m 'not real'" for the fast ones)
# make golden       set up .venv-golden with the libraries SAEs are published with, and compare with what they compute
#
# WORKERS=4             how many files of tests run side by side
# PYTHON=python3.12     the interpreter to use, 3.11 to 3.13
# TORCH_INDEX=ADDRESS   the package index to take PyTorch from. On Linux without an NVIDIA GPU, PyTorch's own CPU index
#                       gives a far smaller download than the default one; everywhere else leave it out.

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
GOLDEN := .venv-golden
TORCH := $(shell grep '^torch==' constraints.txt)

.DELETE_ON_ERROR:
.PHONY: setup quickstart test golden coverage lint format types wheel clean

quickstart: $(READY)
	@$(BIN)/saeguard quickstart $(ARGS)

test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

golden: $(GOLDEN)/.ready
	@PYTHONPATH=src $(GOLDEN)/bin/python -m pytest tests/test_sae_golden.py tests/test_sae_registry.py $(ARGS)

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
	rm -rf $(VENV) $(GOLDEN) build dist htmlcov .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache

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

# It borrows what .venv has. Two libraries are installed without what they need for training, which includes another
# build of PyTorch's companions.
$(GOLDEN)/.ready: $(READY)
	@$(PYTHON) -m venv $(GOLDEN)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	    $(BIN)/python -c "$$site" > "$$($(GOLDEN)/bin/python -c "$$site")/borrowed.pth"
	@$(GOLDEN)/bin/python -m pip install -c constraints.txt 'sae-lens==6.54.12' 'eai-sparsify==1.3.3' \
	    openai pymongo cattrs more-itertools json-repair tomlkit pydantic-settings >&2
	@$(GOLDEN)/bin/python -m pip install --no-deps 'dictionary-learning==0.1.0' 'llamascopium==2.0.0b34' \
	    'nnsight==0.3.7' python-socketio python-engineio simple-websocket wsproto bidict websocket-client >&2
	@touch $@
