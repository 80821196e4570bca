# Two commands do everything: `make run` (the main job, end to end) and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := build/tools
# N processes, each with one computing thread. Some of all tests wait for servers and clusters a while.
quick fast: N ?= 2
test all-tests: N ?= 4
# Some containers turn byte code off: then each process compiles all that it imports from source.
unexport PYTHONDONTWRITEBYTECODE
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(N)

.DEFAULT_GOAL := help
.PHONY: help setup run quick fast test all-tests check docs ui lock sbom audit clean

help:  ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$($(PYTHON) --version) is too old: install Python 3.11 or newer, or name one: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet \
	  --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(STAMP)  ## make the virtual environment and install the pinned dependencies

run: $(STAMP)  ## simulate the whole campaign, train and register a first model, predict the examples
	$(BIN)/python -m pipelines.run

quick: $(STAMP)  ## check the code and pass the fast tests, at the same time: a minute
	@$(MAKE) --no-print-directory --jobs=2 check fast

fast: $(STAMP)
	$(PYTEST) -q -m "not (slow or training or cluster or slurm or postgresql or gsas2)"

test: $(STAMP)  ## check the code and pass all tests, in four processes (make test N=8: in eight)
	@$(MAKE) --no-print-directory --jobs=2 N=$(N) check all-tests

all-tests: $(STAMP)
	$(PYTEST) $(PYTEST_OPTIONS)

check: $(STAMP)  ## format, lint, types, arrows and spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/codespell

docs: $(STAMP)  ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo 'Documentation: build/site/index.html'

ui: $(STAMP)  ## start the MLflow UI on this project's runs and print its address
	$(BIN)/python -m pipelines.ui

lock: $(STAMP)  ## write requirements.lock: the pinned packages with the hashes of their files
	@mkdir -p build
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --dry-run --ignore-installed \
	  --report build/lock.json --constraint constraints.txt '.[dev]'
	$(BIN)/python deploy/lock.py build/lock.json

$(TOOLS)/.installed: Makefile
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --disable-pip-version-check --quiet \
	  cyclonedx-bom==7.5.0 pip-licenses==5.5.5 pip-audit==2.10.1
	@touch $@

sbom: $(STAMP) $(TOOLS)/.installed  ## list what is installed, with licences: build/sbom.json, build/licences.md
	$(TOOLS)/bin/cyclonedx-py environment $(VENV) --pyproject pyproject.toml --output-reproducible \
	  --output-file build/sbom.json
	$(TOOLS)/bin/pip-licenses --python $(BIN)/python --order license --format markdown \
	  --output-file build/licences.md

audit: $(TOOLS)/.installed  ## compare requirements.lock with an advisory database (needs its server)
	$(TOOLS)/bin/pip-audit --disable-pip --require-hashes --requirement requirements.lock

clean:  ## remove the virtual environment and caches (never the data)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
