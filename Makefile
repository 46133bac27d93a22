# make run   create .venv and run the main experiment
# make test  create .venv and run the tests, the fast ones first
# make newest  types, a short main experiment and a part of the tests with the newest JAX, on Python 3.13
# make lint  create .venv, check format, lint and types
# make docs  create .venv-docs and build the site into site/
# make pages create .venv and rewrite what the pages take from code and results/: methods, rooms, figures, tables

VENV ?= .venv
DOCS_VENV ?= .venv-docs
LOCK ?= requirements.lock
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
CONFIG ?= configs/qkd.py
WORKDIR ?= runs/qkd_digits
PYTEST_FLAGS ?= -n auto

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
READY := $(VENV)/.ready
DOCS_READY := $(DOCS_VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env run test newest lint docs pages format clean

help:
	@sed -n 's/^# make/make/p' Makefile

env: $(READY)

# The lock has everything (run, export, tests), so one environment serves every target. The stamp is
# written last: an interrupted installation starts over.
$(READY): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("qkd_jax needs Python 3.11 to 3.13; this is %s. Set PYTHON=." % sys.version.split()[0] if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0)'
	@echo "Creating $(VENV) from $(LOCK) (about two minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -r $(LOCK)
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

run: $(READY)
	$(BIN)/python launch.py --config=$(CONFIG) --workdir=$(WORKDIR)

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow"
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m slow

newest:
	.ci/newest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

# The site reads docstrings from the source, so it needs neither jax nor the package installed.
$(DOCS_READY): docs/requirements.lock
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip -qq --disable-pip-version-check install -r docs/requirements.lock
	@touch $@

docs: $(DOCS_READY)
	PATH="$(DOCS_VENV)/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict
	@echo "The site is site/index.html."

pages: $(READY)
	$(BIN)/python docs/make_pages.py
	$(BIN)/python docs/make_figures.py
	$(BIN)/python docs/make_results.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-newest $(DOCS_VENV) site build *.egg-info .pytest_cache .ruff_cache
