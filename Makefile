# Two commands: `make demo` and `make test`. Both make what they need in .venv, with the exact versions of
# locks/. PYTHON names another interpreter (3.11 or newer), whose environment is .venv-VERSION: make test PYTHON=python3.12
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv$(if $(filter-out file,$(origin PYTHON)),-$(VERSION))
BIN := $(VENV)/bin
LOCK := $(wildcard locks/python$(VERSION).txt)
LOCKED := 3.11 3.12 3.13 3.14
# torch is asked for by itself, and first, so that nothing else chooses a larger build of it
TORCH := torch==2.13.0
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# pip holds itself to these, also where it builds a package; newer ones have a name of its own for that
ifneq ($(LOCK),)
export PIP_CONSTRAINT := $(abspath $(LOCK))
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
endif

# Modules are compiled once, not by each of the hundreds of processes that the tests start
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-without-torch test-newest thorough lint docs drawing lock clean bench gpu gpu-check gpu-execute gpu-step fuzz test-writers

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.test
	$(PYTEST) $(ARGS)

# All cases of the large grids, of which `make test` runs a part. XLA optimizes its machine code, as it does for users
thorough: $(VENV)/.test
	XLA_FLAGS= $(PYTEST) --thorough $(ARGS)

# The tests that need neither PyTorch nor what comes with it: make test-without-torch PYTHON=python3.13
test-without-torch: $(VENV)/.test-without-torch
	$(PYTEST) --without-torch $(ARGS)

# The same tests as `make test`, with the newest releases that pyproject.toml allows
test-newest:
	env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT $(MAKE) test VENV=.venv-newest-$(VERSION) LOCK=

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The pages of docs/ and the reference of what users import, as a site; a link that leads nowhere is an error.
# Not with --quiet, which hides warnings from --strict. The variable leaves out an advertisement of the theme.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html"

# docs/architecture.svg, from the imports; needs Python alone
drawing:
	$(PYTHON) -m tests.architecture

# What the environments consist of, one file for each minor version of Python: the newest that fit together
lock: .venv-lock/bin/uv
	mkdir -p locks
	for version in $(LOCKED); do \
	  printf '%s\n' '$(TORCH)' hatchling editables setuptools wheel | \
	  .venv-lock/bin/uv pip compile --quiet --upgrade --universal --python-version $$version --no-header --no-annotate \
	    --extra test --extra oracle --extra lint --extra docs --extra gpu-check \
	    -o locks/python$$version.txt pyproject.toml - || exit; \
	done

# CPU benchmarks against transformers; results go to benchmarks/results
bench: $(VENV)/.test
	$(BIN)/python benchmarks/language_speed.py
	$(BIN)/python benchmarks/first_token.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/plot.py

# Every kernel compiled for four GPUs that need not be there; writes docs/machine_code.md
gpu-check: $(VENV)/.test
	JAX_PLATFORMS=cpu PYTHONPATH=$(VENV)/gpu-check $(BIN)/python -m tests.gpu_check

# Every kernel's machine code executed on a CPU, for the same four GPUs; writes docs/executed.md, half an hour
gpu-execute: $(VENV)/.test-without-torch
	JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false PYTHONPATH=$(VENV)/gpu-check \
	  $(BIN)/python -m tests.executed.run $(ARGS)

# Whole programs of published models compiled for two GPUs: their kernels, bytes, and predicted times; docs/step.md
gpu-step: $(VENV)/.test-without-torch
	JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false PYTHONPATH=$(VENV)/gpu-check \
	  $(BIN)/python -m tests.gpu_step $(ARGS)

# On a machine with an NVIDIA GPU, 25 minutes: the GPU's tests, tuned tiles, figures with peers. Uses PYTHON as
# it is (jax with CUDA, pytest, matplotlib), and no network; results go to $$OUT or benchmarks/results/gpu
gpu:
	$(PYTHON) benchmarks/gpu_run.py

# 20,000 broken checkpoints, and 5,000 with broken files beside the weights; writes docs/reliability.md.
# SEED=… makes the same ones again
fuzz: $(VENV)/.test
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.fuzz.run $(if $(SEED),--seed $(SEED)) \
	  $(if $(MUTANTS),--mutants $(MUTANTS))
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.fuzz.beside.run $(if $(SEED),--seed $(SEED)) \
	  $(if $(MUTANTS),--mutants $(MUTANTS))

# Before each release: the newest of other tools quantize SmolLM2 and a small model of each family, and what they write
# is checked; writes docs/reliability.md. make test-writers ARGS="--writer AutoRound --model mixtral" does a part
WRITERS := llmcompressor auto-round gptqmodel
test-writers: $(VENV)/.test $(WRITERS:%=.venv-writers/%/.made)
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.writers.run $(ARGS)

clean:
	rm -rf .venv .venv-* .cache/programs site

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxwna16 needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(if $(LOCK),,echo "No lock for Python $(VERSION), or none wanted: the newest releases are installed")
	$(PYTHON) -m venv $(VENV)

.venv-lock/bin/uv:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install -q uv

$(VENV)/.demo: pyproject.toml $(LOCK) | $(BIN)/python
	$(BIN)/pip install -q -e '.[demo]'
	touch $@

# Most of what comes is never imported, so it is not compiled. gpu-check holds the CUDA compiler, which shows a kernel's
# machine code on a machine without a GPU; jax must not find it otherwise.
$(VENV)/.test-without-torch: pyproject.toml $(LOCK) | $(BIN)/python
	$(BIN)/pip install -q --no-compile -e '.[test]'
	$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)/gpu-check \
	  $$($(BIN)/python -c 'import jax; print(*(f"jax-cuda13-{p}=={jax.__version__}" for p in ("plugin", "pjrt")))') \
	  nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvdisasm
	touch $@

$(VENV)/.test: $(VENV)/.test-without-torch
	$(BIN)/pip install -q --no-compile '$(TORCH)'
	$(BIN)/pip install -q --no-compile -e '.[oracle]'
	touch $@

# Each writer has an environment of its own, since they ask for different versions of the same packages; remove
# .venv-writers to get newer ones. One that cannot be installed is no reason to stop: the table says that it does not start
.venv-writers/%/.made: tests/writers/theirs/install.py
	$(PYTHON) -m venv --clear .venv-writers/$*
	-env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT .venv-writers/$*/bin/python $< $* '$(TORCH)' && touch $@

$(VENV)/.lint: $(VENV)/.test
	$(BIN)/pip install -q -e '.[lint]'
	touch $@

$(VENV)/.docs: pyproject.toml $(LOCK) | $(BIN)/python
	$(BIN)/pip install -q -e '.[docs]'
	touch $@
