# Everything from a fresh clone: each target makes its own environment in .venv, and touches nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help venv quickstart test bench gpu-check report clean

help:
	@echo "make quickstart   train a small cascade on captioned shapes and look at its pictures"
	@echo "make test         run all tests"
	@echo "make bench        measure on this machine's processor, within 10 minutes"
	@echo "make gpu-check    test and measure on a GPU, within 9 minutes; PYTHON=... to use an environment of yours"
	@echo "make report       the tables and plots of README.md and docs/ from all result files"
	@echo "make venv         only make the environment, $(VENV)"

venv: $(VENV)/ready

# torch first and alone: whatever depends on it must find the pinned build already there.
$(VENV)/ready: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fastimagen needs Python 3.11 or later; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) torch
	$(PIP) --no-build-isolation --editable '.[test]'
	touch $@

quickstart: venv
	$(BIN)/python launch/quickstart.py

test: venv
	$(BIN)/python -m pytest

# MinImagen without what its training scripts need: benchmarks/harness/peers.py has stand-ins.
bench: venv
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps minimagen==0.0.9 einops-exts resize-right
	$(BIN)/python -m benchmarks.cpu

# In the environment at hand, which has the PyTorch that fits the GPU; nothing is installed.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

report: venv
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf $(VENV) build *.egg-info
