# `make train` and `make test` need Python >= 3.11, a C++ compiler, git and a package index.
PYTHON ?= python3
VENV := .venv
# Steps of `make train`; with a larger number the run resumes from its last checkpoint.
STEPS ?= 120
BIN := $(VENV)/bin
# One thread per rank, because tests start several ranks on few cores. Ranks wait for each other, so
# more than two pytest workers are not faster on two cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Number of cases of `make fuzz`, and their seed.
N ?= 100
SEED ?=

.PHONY: help install test-install train test test-all test-gpu fuzz soak fuzz-readers lint fix patch-check clean

help:
	@echo "make train        install, then train a tiny gpt-oss on real text (runs/tiny; STEPS=120)"
	@echo "make test         install, then all CPU tests that are not slow"
	@echo "make test-all     all CPU tests"
	@echo "make fuzz         random models, layouts and options against one process (N=100 SEED=)"
	@echo "make fuzz-readers 2,000 mutations of a valid file for each reader (N=2000)"
	@echo "make test-gpu     tests that need a CUDA device, with python3 instead of .venv"
	@echo "make lint, fix    format, imports, unused names, wording: check, or rewrite"
	@echo "make patch-check  the series applies, headers are complete, groups apply alone"

install: $(VENV)/installed

test-install: $(VENV)/installed-test

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Pins torch for CPU machines; with another torch installed use `pip install -e .`.
$(VENV)/installed: $(VENV)/bin/python setup.py pyproject.toml constraints.txt patches/series patches/*/*.patch
	$(BIN)/pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet -e ".[report]" -c constraints.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet -e ".[test,lint]" -c constraints.txt
	touch $@

train: install
	PATH="$(abspath $(BIN)):$$PATH" examples/gpt_oss/train_tiny.sh runs/tiny $(STEPS)

test: test-install
	$(PYTEST) $(PARALLEL) -m "not gpu and not slow" --durations=10

test-all: test-install
	$(PYTEST) $(PARALLEL) -m "not gpu" --durations=20

fuzz: test-install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --count $(N) $(if $(SEED),--seed $(SEED)) --shrink

soak: test-install
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.soak --faults $(N) $(if $(SEED),--seed $(SEED))

fuzz-readers: test-install
	READER_EXAMPLES=$(if $(filter file,$(origin N)),2000,$(N)) $(PYTEST) tests/unit_tests/gpt_oss/test_readers.py

test-gpu:
	$(PYTHON) -m pytest -q -m gpu

lint: test-install
	$(BIN)/ruff format --check -q $(SOURCES)
	$(BIN)/ruff check -q $(SOURCES)
	$(BIN)/python tools/check_wording.py

fix: test-install
	$(BIN)/ruff check -q --fix $(SOURCES)
	$(BIN)/ruff format -q $(SOURCES)

# Python files of this project; upstream's files keep their formatting.
SOURCES = $(shell git ls-files '*.py')

patch-check: test-install
	$(BIN)/python tools/patches.py check

clean:
	rm -rf build *.egg-info .pytest_cache .megatron.*
