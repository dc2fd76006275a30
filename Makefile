# Each target works from a fresh clone: it creates a virtual environment in .venv and changes nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes, each with whole files of tests: module fixtures are made once.
PARALLEL := -n 2 --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help venv quickstart test test-fast drills lint bench gpu-check report docs clean

help:
	@echo "make quickstart   train a small cascade on captioned shapes and sample images from it"
	@echo "make test         run all tests except the drills"
	@echo "make test-fast    run the tests that take less than a few seconds each, within 2 minutes"
	@echo "make drills       run the tests that take minutes each"
	@echo "make lint         check style, format and types (ruff, mypy)"
	@echo "make bench        benchmark on this machine's CPU, within 12 minutes"
	@echo "make gpu-check    test and benchmark on a GPU, within 9 minutes; set PYTHON to use another environment"
	@echo "make report       regenerate the tables and plots of README.md and docs/ from all result files"
	@echo "make docs         build the documentation site in build/site"
	@echo "make venv         create the environment in $(VENV), and do nothing else"

venv: $(VENV)/ready

# Install torch first and alone: packages that depend on it must find the pinned build in place.
$(VENV)/ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fastimagen needs Python 3.11 or later; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) torch
	$(PIP) --no-build-isolation --editable '.[test,dev,docs]'
	touch $@

quickstart: venv
	$(BIN)/python -m fastimagen quickstart

test: venv
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: venv
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not drill and not gpu'

drills: venv
	$(BIN)/python -m pytest -m drill

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# MinImagen is installed without the dependencies of its training scripts: benchmarks/harness/peers.py replaces them.
bench: venv
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps minimagen==0.0.9 einops-exts resize-right
	$(BIN)/python -m benchmarks.cpu

# Runs in the current environment, whose PyTorch fits the GPU, and installs nothing.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

report: venv
	$(BIN)/python -m benchmarks.report

# The variable silences an announcement that Material for MkDocs prints before every build.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build *.egg-info
