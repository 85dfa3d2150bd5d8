# `make help` lists the commands. Needs GNU make, a POSIX shell and Python 3.11 or newer; makes its own environment.
VENV ?= .venv
VENV_LOWEST ?= .venv-lowest
# The interpreter that a new environment is made with; empty: the first one on PATH that is recent enough.
PYTHON ?=
export PYTHON

# Which extras a given one includes, so that a smaller one is not installed again after a larger one.
INCLUDED_demo = demo
INCLUDED_test = demo test
INCLUDED_dev = demo test docs dev
INCLUDED_docs = docs

# Their code is formatted to the columns that a page of the site has.
PAGES = $(wildcard *.md docs/*.md docs/*/*.md examples/*/*.md benchmarks/*.md)

# Two processes of one thread each: on two cores half the time of one process.
TWO_AT_ONCE = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-slow test-lowest quality style docs clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Options: PYTHON=python3.12 (for a new environment), VENV=DIR (default .venv)"

demo: $(VENV)/.installed-demo  ## run the whole way on bundled material, offline once installed
	$(VENV)/bin/hf-vs2 demo

test: $(VENV)/.installed-test  ## run the tests, without the slow ones
	$(TWO_AT_ONCE) $(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/.installed-test  ## run the slow tests
	$(VENV)/bin/python -m pytest -m slow

test-lowest: $(VENV_LOWEST)/.installed-lowest  ## run the tests with the lowest supported Hugging Face libraries
	$(TWO_AT_ONCE) $(VENV_LOWEST)/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

quality: $(VENV)/.installed-dev  ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff format --check --line-length 88 $(PAGES)
	$(VENV)/bin/mypy

style: $(VENV)/.installed-dev  ## fix style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff format --line-length 88 $(PAGES)

docs: $(VENV)/.installed-docs  ## build the documentation into site/
	$(VENV)/bin/mkdocs build --strict

clean:  ## remove the environments made here, builds and caches
	@for venv in "$(VENV)" "$(VENV_LOWEST)"; do \
		if [ -e "$$venv/.made-by-hf-vs2" ]; then echo "removing $$venv"; rm -rf "$$venv"; fi; \
	done
	rm -rf build dist site src/hf_vs2.egg-info .mypy_cache .ruff_cache .pytest_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written only after a whole installation, so an interrupted one is taken up again.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@sh scripts/install.sh "$(VENV)" $* constraints.txt
	@touch $(INCLUDED_$*:%=$(VENV)/.installed-%)

$(VENV_LOWEST)/.installed-lowest: pyproject.toml constraints-lowest.txt
	@sh scripts/install.sh "$(VENV_LOWEST)" test constraints-lowest.txt
	@touch $@
