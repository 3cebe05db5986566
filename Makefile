# Two commands matter: `make quickstart` and `make test`.
ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
VENV := $(ROOT).venv
# By default the first Python 3.12 or 3.13 that requirements/find_python.sh finds.
PYTHON ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCKS := $(ROOT)requirements/base.lock $(ROOT)requirements/gpu.lock
LAUNCH_VENV := $(ROOT).venv-launch
LAUNCH_STAMP := $(LAUNCH_VENV)/.installed
LAUNCH_LOCK := $(ROOT)requirements/launch.lock
BRIDGE_VENV := $(ROOT).venv-bridge
BRIDGE_STAMP := $(BRIDGE_VENV)/.installed
BRIDGE_LOCK := $(ROOT)requirements/bridge.lock
ARGS ?=

export OMP_NUM_THREADS ?= 1

.PHONY: study-small study study-ablations install install-bridge install-slurm install-launch quickstart check format soak nightly clean \
	test test-bridge test-commands test-evaluation test-processes test-slurm test-units

# One environment for machines with and without an NVIDIA GPU.
install: $(STAMP)

$(STAMP): $(LOCKS) $(ROOT)pyproject.toml $(ROOT)Makefile $(ROOT)requirements/install.sh
	@$(ROOT)requirements/install.sh $(VENV) $(PYTHON)

quickstart: $(STAMP)
	cd $(ROOT) && $(BIN)/offgrpo quickstart $(ARGS)

# The scale model of docs/study.md: 2 seeds and 4 arms; all arms, 5 seeds; variations of the released objective.
study-small: $(STAMP)
	cd $(ROOT) && $(BIN)/python -m tools.study small $(ARGS)

study: $(STAMP)
	cd $(ROOT) && $(BIN)/python -m tools.study core $(ARGS)

study-ablations: $(STAMP)
	cd $(ROOT) && $(BIN)/python -m tools.study ablations $(ARGS)

# Three parts side by side, since most tests wait for processes of their own, then two; each prints what it found when it
# is done. Slurm's tests, whose daemons have time limits of their own, share two cores with one part at most.
PARTS = --output-sync=target --keep-going --no-print-directory -C $(ROOT)
test: $(STAMP) install-slurm install-launch
	@echo "all tests, three parts and then two: about eleven minutes, the first results come after six"
	status=0; $(MAKE) --jobs=3 $(PARTS) test-commands test-processes test-units || status=1; \
		$(MAKE) --jobs=2 $(PARTS) test-slurm test-evaluation || status=1; exit $$status

test-commands:
	$(BIN)/python -m pytest tests/system --ignore tests/system/slurm --ignore-glob '*/test_eval*' $(ARGS)

test-evaluation:
	$(BIN)/python -m pytest tests/system/test_eval*.py $(ARGS)

test-slurm:
	$(BIN)/python -m pytest tests/system/slurm $(ARGS)

test-processes:
	$(BIN)/python -m pytest tests/distributed tests/parity $(ARGS)

test-units:
	$(BIN)/python -m pytest tests/unit tests/gpu $(ARGS)

# What is too long for every change: five chains in a row on Slurm, and the like.
soak: $(STAMP) install-slurm install-launch
	cd $(ROOT) && $(BIN)/python -m pytest -m "soak or not soak" tests/soak $(ARGS)

nightly: study-small soak test-bridge

# Converters and checkpoints against Megatron-Bridge: two minutes.
test-bridge: install-bridge
	cd $(ROOT) && $(BIN)/python -m pytest tests/bridge $(ARGS)

# For the tests: a Slurm that they start themselves.
install-slurm:
	$(ROOT)tests/system/slurm/install.sh

# `.venv-launch/bin/offgrpo launch`: NeMo-Run pins packages that the project needs in other versions.
install-launch: $(LAUNCH_STAMP)

$(LAUNCH_STAMP): $(LAUNCH_LOCK) $(ROOT)pyproject.toml
	@python=$$($(ROOT)requirements/find_python.sh $(PYTHON)) && $$python -m venv --clear $(LAUNCH_VENV)
	$(LAUNCH_VENV)/bin/pip --disable-pip-version-check --quiet install --no-deps -r $(LAUNCH_LOCK)
	$(LAUNCH_VENV)/bin/pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation --editable $(ROOT)
	touch $(LAUNCH_STAMP)

# Megatron-Bridge, over the project's environment: its own packages come first, all else is that environment's.
install-bridge: $(BRIDGE_STAMP)

$(BRIDGE_STAMP): $(BRIDGE_LOCK) $(STAMP)
	@$(BIN)/python -c "import sys; sys.exit(sys.version_info[:2] != (3, 12))" || { echo "error: Megatron-Bridge 0.6" \
		"needs Python 3.12; $(VENV) has $$($(BIN)/python --version): make clean and make PYTHON=python3.12 install" >&2; exit 1; }
	$(BIN)/python -m venv --clear $(BRIDGE_VENV)
	$(BRIDGE_VENV)/bin/pip --disable-pip-version-check --quiet install --no-deps -r $(BRIDGE_LOCK)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $(BRIDGE_VENV)/lib/python3.12/site-packages/project.pth
	touch $(BRIDGE_STAMP)

check: $(STAMP)
	cd $(ROOT) && $(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

format: $(STAMP)
	cd $(ROOT) && $(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(BRIDGE_VENV) $(LAUNCH_VENV) $(ROOT)runs
