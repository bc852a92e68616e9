# Two commands on a fresh machine with Python 3.11 or newer, pip and make:  make demo   and   make test
#
# .venv is built in two stages, each with a stamp that is written last, so an interrupted run is never taken for
# a finished one:
#   .venv/.dependencies  every pin of constraints.txt is installed; missing -> .venv is made anew
#   .venv/.installed     lrkit and plugins/* are installed, as wheels, from the sources as they are now
# .venv-integrations (trainers and quantisers that lrkit works with) and .venv-lowest (the oldest versions that
# pyproject.toml admits) are built alike, by hand: `make test-integrations`, `make test-lowest`.
# Tests, docs and demo use the installed wheel, not the source folder (python -P keeps the current folder off sys.path).

PY       := .venv/bin/python
PIP      := $(PY) -m pip --disable-pip-version-check --no-input
PLUGINS  := $(patsubst %/pyproject.toml,./%,$(wildcard plugins/*/pyproject.toml))
SOURCES  := pyproject.toml README.md LICENSE $(shell find lrkit $(PLUGINS) -name __pycache__ -prune -o -print)
TWINE    := twine==7.0.0
ARGS     ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-integrations test-lowest fuzz mutants roles check bench docs release clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1 \t/p' $(MAKEFILE_LIST) | expand -t 26

setup: .venv/.installed ## build .venv with the pinned dependencies and lrkit (first time: one to two minutes)
	@echo "lrkit: .venv is ready"

.venv/.dependencies: constraints.txt
	@if [ -e $@ ]; then rm $@; echo "lrkit: constraints.txt has changed: bringing .venv up to date"; exit 0; fi; \
	for python in python3.11 python3 python3.12 python3.13; do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; python=; \
	done; \
	if [ -z "$$python" ]; then echo "lrkit needs Python 3.11 or newer as python3.11 or python3; found: $$(python3 --version 2>&1)" >&2; exit 1; fi; \
	echo "lrkit: setting up .venv with $$($$python --version) (one to two minutes, once)"; \
	rm -rf .venv; \
	$$python -m venv .venv >/dev/null 2>&1 || { \
	  $$python -m venv --clear --without-pip .venv && $$python -m pip -qq --python $(PY) install pip; }
	@$(PIP) -qq install -c constraints.txt pip setuptools
	@echo "lrkit: 1/3 torch (about half a minute)"
	@$(PIP) -qq install -c constraints.txt torch
	@echo "lrkit: 2/3 the other pinned dependencies (about a minute)"
	@$(PIP) -qq install --no-deps -r constraints.txt
	@touch $@

# A second try without uninstalling first: pip cannot take away what an interrupted pip had half written.
.venv/.installed: .venv/.dependencies $(SOURCES)
	@echo "lrkit: 3/3 installing $(strip lrkit $(notdir $(PLUGINS))) (a few seconds)"
	@rm -f $@
	@set -- install -c constraints.txt --no-build-isolation '.[dev,docs]' $(PLUGINS); \
	$(PIP) -qq "$$@" 2>.venv/install.log || $(PIP) -qq "$$@" --no-deps --ignore-installed || { cat .venv/install.log >&2; exit 1; }
	@touch $@

demo: .venv/.installed ## fine-tune MiniLM on movie sentences with four methods: a table and pictures (under 10 minutes)
	@.venv/bin/lrkit demo $(ARGS)

test: .venv/.installed ## all tests, the documents' examples included (ARGS="-k freeze" for some)
	@$(PY) -P -m pytest -q -n 2 --dist loadfile $(ARGS)

test-integrations: .venv-integrations/.installed ## lrkit beside TRL, Lightning, bitsandbytes, torchao, quanto, ... (by hand)
	@.venv-integrations/bin/python -P -m pytest -q tests/integrations $(ARGS)

test-lowest: .venv-lowest/.installed ## all tests with the lowest versions that lrkit admits (by hand; torch there is 5 GB)
	@.venv-lowest/bin/python -P -m pytest -q -n 2 --dist loadfile $(ARGS)

roles: .venv/.installed ## build every family of transformers without storage: docs/roles.md (half a minute, by hand)
	@$(PY) -P tests/roles.py

mutants: .venv/.installed ## change the core's formulas one at a time: the tests must see it
	@$(PY) -P tests/mutants.py $(ARGS)

.venv-integrations/.dependencies: .venv/.dependencies constraints.txt constraints-integrations.txt
	@$(call venv,.venv-integrations)
	@.venv-integrations/bin/python -m pip -qq install -c constraints.txt pip setuptools torch
	@.venv-integrations/bin/python -m pip -qq install --no-deps -r constraints.txt -r constraints-integrations.txt
	@touch $@

.venv-lowest/.dependencies: .venv/.dependencies constraints-lowest.txt
	@$(call venv,.venv-lowest)
	@.venv-lowest/bin/python -m pip -qq install --no-deps -r constraints-lowest.txt
	@touch $@

.venv-integrations/.installed .venv-lowest/.installed: %/.installed: %/.dependencies $(SOURCES)
	@$*/bin/python -m pip -qq install --no-deps --no-build-isolation --force-reinstall . $(PLUGINS)
	@touch $@

# A new environment with the Python of .venv
venv = rm -rf $(1); echo "lrkit: setting up $(1)"; $(PY) -m venv $(1) >/dev/null 2>&1 || \
  { $(PY) -m venv --clear --without-pip $(1) && $(PY) -m pip -qq --python $(1)/bin/python install pip; }

check: .venv/.installed ## lint, format, rooms, types, documentation
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PYTHONPATH=. .venv/bin/lint-imports --no-cache
	$(PY) -P -m pytest -q tests/test_house.py
	$(PY) -P tests/mutants.py --check
	$(PY) -m mypy --strict lrkit
	@$(MAKE) --no-print-directory docs

docs: .venv/.installed ## build the documentation into docs/_build/html; a warning is an error
	$(PY) -P -m sphinx -q -n -W --keep-going -b html docs docs/_build/html

bench: .venv/.installed ## every benchmark in tests/bench, and one table (15 minutes; ARGS="--rounds 0.3" for a look)
	@out=$$(mktemp -d); export PYTHONPATH=tests/bench:tests; \
	for f in tests/bench/bench_*.py; do \
	  echo "== $$f"; $(PY) -P "$$f" --json "$$out/$$(basename $$f .py).json" $(ARGS) || exit 1; \
	done; \
	$(PY) -P tests/bench/report.py "$$out"; echo "figures: $$out/all.json"

# Wheels are made of the sdists, and installed alone into an empty environment, in a folder and with a cache that are new.
# So the demo has to find MiniLM and its sentences by itself, too.
release: .venv/.installed ## sdists and wheels of lrkit and each plug-in in dist/, tried in an empty environment (by hand)
	@rm -rf dist; for project in . $(PLUGINS); do \
	  (cd $$project && $(CURDIR)/$(PY) -m hatchling build -t sdist -d $(CURDIR)/dist >/dev/null) || exit 1; \
	done
	@$(PIP) -qq wheel --no-deps --no-build-isolation -w dist dist/*.tar.gz
	@unset PYTHONPATH; room=$$(mktemp -d); trap 'rm -rf "$$room"' EXIT; set -e; \
	$(call venv,$$room/twine); $$room/twine/bin/python -m pip -qq install $(TWINE); \
	$$room/twine/bin/python -m twine check --strict dist/*; \
	$(call venv,$$room/env); $$room/env/bin/python -m pip -qq install torch==$$(sed -n 's/^torch==//p' constraints.txt) dist/*.whl; \
	cd $$room; export LRKIT_CACHE=$$room/cache; \
	env/bin/lrkit plugins; env/bin/lrkit demo --steps 20; env/bin/lrkit run sora --set run.steps=20
	@echo "dist/ is ready: docs/contributing.md says how it is published"

fuzz: .venv/.installed ## 4,000 bad inputs, by hand (ARGS="--seed 7 --cases 100" for others)
	@OMP_NUM_THREADS=1 $(PY) -P tests/fuzz.py $(ARGS)

clean: ## remove .venv, caches and the built documentation
	rm -rf .venv .venv-integrations .venv-lowest docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
