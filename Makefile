# `make` lists what there is. Every target makes the environment in .venv first if it is missing or its pins have changed.
# The project may lie anywhere: paths here are relative, tools are called as modules (the first line of an installed script
# cannot name every path), and what a person sets reaches the shell as a variable, never as text of a command.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
ifeq ($(filter oneshell,$(.FEATURES)),)
$(error found make $(MAKE_VERSION), expected GNU make 3.82 or later; on macOS: brew install make, then gmake)
endif
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help reproduce reproduce-all grid test test-faults test-browser bench book lab audit clean

PROFILE ?= default
CORES ?= 2
BENCH ?=
YES ?=
PYTHON ?= $(shell command -v python3.11 || command -v python3)
export PROFILE CORES PYTHON BENCH YES
unexport PYTHONDONTWRITEBYTECODE  # set, every notebook would compile torch and all the rest again: 15 s each
READY := .venv/.ready
BOOK := .venv-book/.ready

help:
	@echo "make reproduce [PROFILE=smoke|default|full] [CORES=2]   environment, data, model, the main study, figures"
	@echo "make reproduce-all                                     the same, ablations, further studies, theory"
	@echo "make grid [PROFILE=full]                               every method and seed of notebook 12 side by side, within memory"
	@echo "make test                                              environment, then lint, types and every test"
	@echo "make test-faults                                       200 kills, full disks, 480 damaged files, 2,400 changed texts"
	@echo "make bench                                             speed beside TRL and transformers: table and figure; can be stopped"
	@echo "make book [PROFILE=default]                            executed notebooks, guide and gallery as pages that need no network"
	@echo "make lab                                               JupyterLab on the project, on copies of the notebooks in lab/"
	@echo "make test-browser                                      JupyterLab and the explorer in a real browser; needs Chromium"
	@echo "make audit                                             known weaknesses of the pinned packages; needs the network"
	@echo "make clean [YES=1]                                     remove results and caches, asks first; keeps .venv and downloads"

reproduce reproduce-all: export MIXDPO_STARTED := $(shell date +%s)
reproduce: $(READY)
	@MIXDPO_PARENT=$$PPID exec .venv/bin/python -m mixdpo_lib.cli reproduce --profile "$$PROFILE" --cores "$$CORES"

reproduce-all: $(READY)
	@MIXDPO_PARENT=$$PPID exec .venv/bin/python -m mixdpo_lib.cli reproduce --all --profile "$$PROFILE" --cores "$$CORES"

grid: $(READY)
	@MIXDPO_PARENT=$$PPID exec .venv/bin/python -m mixdpo_lib.cli grid --profile "$$PROFILE" --cores "$$CORES"

test: $(READY)
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy & types=$$!
	.venv/bin/python -c 'from importlinter.cli import lint_imports_command as main; main()' --no-logo --no-cache
	wait $$types
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-faults: $(READY)
	@OMP_NUM_THREADS=1 .venv/bin/python tests/faults/harness.py --long

bench: $(READY)
	@.venv/bin/python -m benchmarks.speed --readme $$BENCH

book: $(READY) $(BOOK)
	@.venv/bin/python scripts/book.py "$$PROFILE"

# An environment of its own: Sphinx 7 wants older packages than the project has.
$(BOOK): docs/site/requirements.txt
	@"$$PYTHON" -m venv .venv-book
	echo "[make] installing what makes the book, about a minute"
	.venv-book/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r docs/site/requirements.txt || {
	  echo "[make] error: the book's packages could not be installed (see above); check the network and start make again" >&2; exit 1; }
	touch $@

lab: $(READY)
	@exec .venv/bin/python scripts/lab.py

# Selenium has an environment of its own: the project's stays what was tested.
test-browser: $(READY)
	@for tool in chromium chromedriver; do command -v $$tool >/dev/null || {
	  echo "[make] error: $$tool: not found; on Debian: apt-get install chromium chromium-driver" >&2; exit 1; }; done
	test -x .venv-browser/bin/python || "$$PYTHON" -m venv .venv-browser
	.venv-browser/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt selenium
	exec .venv-browser/bin/python scripts/browser.py

# In an environment of its own, which goes when it is done: the project's stays what was tested.
audit:
	@place="$$(mktemp -d)"; trap 'rm -rf "$$place"' EXIT
	"$$PYTHON" -m venv "$$place/tools"
	"$$place/tools/bin/python" -m pip install -qq --disable-pip-version-check pip-audit || {
	  echo "[make] error: no audit: pip-audit could not be installed (see above); it needs the network" >&2; exit 1; }
	if "$$place/tools/bin/python" -m pip_audit -r constraints.txt --no-deps --disable-pip --progress-spinner off -f json -o "$$place/report"; then
	  echo "[make] audit: no known weakness in the packages of constraints.txt"
	elif test -s "$$place/report"; then
	  "$$PYTHON" -c 'import json, sys; [print(one["name"], one["version"], w["id"], "mended in", ", ".join(w["fix_versions"]) or "no version yet") for one in json.load(open(sys.argv[1]))["dependencies"] for w in one.get("vulns", [])]' "$$place/report"
	  echo "[make] error: audit: known weaknesses, see above; raise these pins and run make test" >&2; exit 1
	else
	  echo "[make] error: no audit: pip-audit got no answer (see above); it needs the network" >&2; exit 1
	fi

# Hours may lie in runs/ and the cache.
clean:
	@if [[ "$$YES" != 1 && ( -e runs || -e data/cache ) ]]; then
	  du -sh runs data/cache 2>/dev/null || true
	  test -t 0 || { echo "[make] error: clean removes these results; nobody is there to ask: make clean YES=1" >&2; exit 1; }
	  read -r -p "remove them? [y/N] " answer
	  [[ "$$answer" == [yY]* ]] || { echo "nothing was removed"; exit 0; }
	fi
	rm -rf runs data/cache .snakemake .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
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
	test -w . || { echo "[make] error: $$PWD cannot be written, and the environment goes there; copy the project to a folder of your own" >&2; exit 1; }
	"$$PYTHON" -c 'import sys; v = sys.version_info[:2]; v == (3, 11) or sys.exit(f"[make] error: found Python {v[0]}.{v[1]} ({sys.executable}), expected 3.11; install it, or name one: make PYTHON=/path/to/python3.11")'
	test -x .venv/bin/python || step "making .venv" "$$PYTHON" -m venv .venv
	step "installing torch, 1 to 3 minutes" .venv/bin/$$pip -c constraints.txt torch
	step "installing the other packages, 1 to 3 minutes" .venv/bin/$$pip -c constraints.txt setuptools -r \
	  <(.venv/bin/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print("\n".join(p["dependencies"] + [one for name, extra in p["optional-dependencies"].items() if name != "all" for one in extra]))')
	step "installing mixdpo itself" .venv/bin/$$pip --no-deps --no-build-isolation -e .
	touch $@
