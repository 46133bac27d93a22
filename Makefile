# make run   create .venv and run the main experiment
# make test  create .venv and run the tests, the fast ones first
# make lint  create .venv, check format, lint and types
# make docs  create .venv-docs and build the site into site/
# make pages create .venv and rewrite what the pages take from the code: methods, rooms, figures

VENV ?= .venv
DOCS_VENV ?= .venv-docs
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
CONFIG ?= configs/qkd.py
WORKDIR ?= runs/qkd_digits
PYTEST_FLAGS ?= -n auto

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
READY := $(VENV)/.ready
DOCS_READY := $(DOCS_VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env run test lint docs pages format clean

help:
	@sed -n 's/^# make/make/p' Makefile

env: $(READY)

# The lock has everything (run, export, tests), so one environment serves every target. The stamp is
# written last: an interrupted installation starts over.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("qkd_jax needs Python 3.11 or newer; this is %s. Set PYTHON=." % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@echo "Creating $(VENV) from requirements.lock (about two minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

run: $(READY)
	$(BIN)/python launch.py --config=$(CONFIG) --workdir=$(WORKDIR)

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow"
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m slow

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

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(DOCS_VENV) site build *.egg-info .pytest_cache .ruff_cache
