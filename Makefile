# Two commands: `make demo` and `make test`. Both make what they need in .venv.
# PYTHON names the interpreter (3.11 or newer): make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test thorough lint clean bench gpu gpu-check fuzz

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# All cases of the large grids, of which `make test` runs a part
thorough: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --thorough

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# CPU benchmarks against transformers; results go to benchmarks/results
bench: $(VENV)/.test
	$(BIN)/python benchmarks/language_speed.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/plot.py

# Every kernel compiled for four GPUs that need not be there; writes docs/machine_code.md
gpu-check: $(VENV)/.test
	JAX_PLATFORMS=cpu PYTHONPATH=$(VENV)/gpu-check $(BIN)/python -m tests.gpu_check

# On a machine with an NVIDIA GPU, 25 minutes: the GPU's tests, tuned tiles, figures with peers. Uses PYTHON as
# it is (jax with CUDA, pytest, matplotlib), and no network; results go to $$OUT or benchmarks/results/gpu
gpu:
	$(PYTHON) benchmarks/gpu_run.py

# 20,000 broken checkpoints; writes docs/reliability.md. SEED=… makes the same ones again
fuzz: $(VENV)/.test
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.fuzz.run $(if $(SEED),--seed $(SEED)) \
	  $(if $(MUTANTS),--mutants $(MUTANTS))

clean:
	rm -rf $(VENV) .cache/programs

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxwna16 needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q -e '.[demo]'
	touch $@

# torch goes first, so that nothing else chooses a larger build of it. Most of what comes is never imported, so it is
# not compiled. gpu-check holds the CUDA compiler, which shows a kernel's machine code on a machine without a GPU; jax
# must not find it otherwise.
$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q --no-compile 'torch==2.13.0'
	$(BIN)/pip install -q --no-compile -e '.[test]'
	$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)/gpu-check \
	  $$($(BIN)/python -c 'import jax; print(*(f"jax-cuda13-{p}=={jax.__version__}" for p in ("plugin", "pjrt")))') \
	  nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvdisasm
	touch $@

$(VENV)/.lint: pyproject.toml $(VENV)/.test
	$(BIN)/pip install -q -e '.[lint]'
	touch $@
