# Everything from a fresh clone: each target makes its own environment in .venv, and touches nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help venv quickstart test bench clean

help:
	@echo "make quickstart   train a small cascade on captioned shapes and look at its pictures"
	@echo "make test         run all tests"
	@echo "make bench        measure on this machine"
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

bench: venv
	$(BIN)/python -m pytest benchmarks --benchmark-only

clean:
	rm -rf $(VENV) build *.egg-info
