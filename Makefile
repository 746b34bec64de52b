# Every target but help and clean first makes .venv and installs the pinned requirements, once per change of them.
# Another interpreter: make test PYTHON=/path/to/python3.12. Some tests only: make test PYTEST_ARGS="-k resume".
# Tests run in two processes side by side, a file in one of them. Another number of processes: make test WORKERS=4.

PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
PYTEST_ARGS ?=
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
# What git tracks, and all files without git: copies of the scripts are not looked at.
SOURCES = $(or $(wildcard $(shell git ls-files '*.py' 2>/dev/null)),.)

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench fidelity mutants clean

# Nothing below asks the Hub for anything, and forked data workers must not inherit the tokenizers' threads.
demo test bench fidelity mutants: export HF_HUB_OFFLINE = 1
demo test bench fidelity mutants: export TOKENIZERS_PARALLELISM = false

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## teach a small model a subject, offline, and draw before and after, into demo-output/
	$(BIN)/python -m utils.demo

test: lint  ## lint, then run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP)  ## check style, formatting and that the two scripts' shared functions are the same
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/python -m utils.check_sync

bench: $(STAMP)  ## measure speed and memory
	$(BIN)/python -m utils.lab.benchmark

fidelity: $(STAMP)  ## measure what both scripts teach the small models; QUICK=1: a part of it
	$(BIN)/python -m utils.lab.fidelity $(if $(QUICK),--quick)

mutants: $(STAMP)  ## change the code in one place at a time and say which changes no test notices
	$(BIN)/python -m utils.lab.mutants

clean:  ## remove caches and demo-output/; .venv and trained models stay
	rm -rf demo-output .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): requirements.txt tests/requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
	    echo "error: $(PYTHON) is not Python 3.11 or newer. Name one that is: make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	@touch $@
