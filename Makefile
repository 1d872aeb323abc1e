# `make demo` and `make test` need Python 3.11+ and make, nothing else; both can be run again and again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SAMPLE := sample_checkpoints/repvgg_digits.pt

.PHONY: demo test check samples readme docs clean

demo: $(VENV)/.installed
	@mkdir -p demo
	$(BIN)/repconv fuse $(SAMPLE) demo/repvgg_digits.safetensors --input 1,1,8,8 --force
	$(BIN)/repconv inspect demo/repvgg_digits.safetensors
	$(BIN)/repconv verify $(SAMPLE) demo/repvgg_digits.safetensors --input 1,1,8,8

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

samples: $(VENV)/.installed-test
	$(BIN)/python sample_checkpoints/make.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --quiet --strict --site-dir site

clean:
	rm -rf $(VENV) demo site

readme: $(VENV)/.installed
	$(BIN)/python benchmarks/readme.py
