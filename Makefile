# make demo   the whole thing on this machine, in its own environment
# make test   what CI runs after `make lint`
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
GPUS   := $(shell command -v nvidia-smi 2>/dev/null)
export MODEL PROMPT

.PHONY: demo test lint format build clean

demo: $(VENV)/.run
	@$(BIN)/python scripts/demo.py $${MODEL:+--model "$$MODEL"} $${PROMPT:+--prompt "$$PROMPT"}

# Tests of GPUs run apart: the others are to see none.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto
ifneq ($(GPUS),)
	$(BIN)/python -m pytest tests/gpu tests/dist
endif

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror src/nvrar/gpu/csrc/* src/yalis/kernels/csrc/*
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i src/nvrar/gpu/csrc/* src/yalis/kernels/csrc/*

build: $(VENV)/.dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist demo

# Two stamps, so that the demo does not wait for what only the tests need.
$(VENV)/.run: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once; torch is the large part)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --quiet -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --quiet -e ".[dev]"
	@touch $@
