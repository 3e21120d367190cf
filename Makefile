# `make` lists what there is. Every target makes the environment in .venv first if it is missing or its pins have changed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help reproduce reproduce-all test lab clean

PROFILE ?= default
CORES ?= 2
PYTHON ?= $(shell command -v python3.11 || command -v python3)
STARTED := $(shell date +%s)
READY := .venv/.ready

help:
	@echo "make reproduce [PROFILE=smoke|default|full] [CORES=2]   environment, data, model, the main study, figures"
	@echo "make reproduce-all                                     the same, ablations and further studies"
	@echo "make test                                              environment, then lint, types and every test"
	@echo "make lab                                               JupyterLab on the notebooks"
	@echo "make clean                                             remove results and caches; keeps .venv and downloads"

reproduce: $(READY)
	@MIXDPO_STARTED=$(STARTED) .venv/bin/mixdpo reproduce --profile $(PROFILE) --cores $(CORES)

reproduce-all: $(READY)
	@MIXDPO_STARTED=$(STARTED) .venv/bin/mixdpo reproduce --all --profile $(PROFILE) --cores $(CORES)

test: $(READY)
	@.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -n 2 --dist loadfile

lab: $(READY)
	@.venv/bin/jupyter lab --notebook-dir=notebooks

clean:
	@rm -rf runs data/cache .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	@echo "removed runs/, data/cache/ and tool caches; .venv/ and data/raw/ stay"

# torch first and exactly: an open range may take another build with several GB more. A line every 10 seconds.
$(READY): pyproject.toml constraints.txt
	@step() {
	  local what=$$1 seconds=0 pid; shift
	  echo "[make] $$what"
	  "$$@" & pid=$$!
	  while kill -0 $$pid 2>/dev/null; do
	    sleep 1; seconds=$$((seconds + 1))
	    if (( seconds % 10 == 0 )); then echo "[make] $$what: $$seconds s"; fi
	  done
	  wait $$pid || { echo "[make] error: $$what: failed (see above); check the network and pip's settings, then start make again" >&2; exit 1; }
	}
	pip="python -m pip install -qq --no-compile --disable-pip-version-check"
	"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; v == (3, 11) or sys.exit(f"[make] error: found Python {v[0]}.{v[1]} ($(PYTHON)), expected 3.11; install it, or name one: make PYTHON=/path/to/python3.11")'
	test -x .venv/bin/python || step "making .venv" "$(PYTHON)" -m venv .venv
	step "installing torch, 1 to 3 minutes" .venv/bin/$$pip "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	step "installing the other packages, 1 to 3 minutes" .venv/bin/$$pip -c constraints.txt setuptools -r \
	  <(.venv/bin/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print("\n".join(p["dependencies"] + p["optional-dependencies"]["test"]))')
	step "installing mixdpo itself" .venv/bin/$$pip --no-deps --no-build-isolation -e .
	touch $@
