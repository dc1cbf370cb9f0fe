# Everything runs in .venv, which `setup` makes from constraints.txt; nothing else has to be installed but Python 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.made

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Enclave and worker share the cores. With OpenMP's default policy the idle process spins on the cores that the other one needs.
TESTS := test test-slow test-lowest test-newest test-wheel
$(TESTS) demo bench audit gpu-check: export OMP_WAIT_POLICY := passive
$(TESTS) demo bench audit gpu-check: export GOMP_SPINCOUNT := 1000
# No test may depend on what a model hub serves today.
$(TESTS): export HF_HUB_OFFLINE := 1

# Enclave and worker take turns, so one run of pytest leaves half of two cores idle: two run beside each other. These
# are about half of the time, in both tiers; what is not named here is in the other half.
HALF := $(addprefix tests/,docs examples exactness faults parties protocol cli/test_ranks.py studies/reproduce/test_results.py)
halves = $(MAKE) --no-print-directory --jobs=2 one-half other-half PYTEST='$(1)/python -m pytest -m "$(2)"'

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-lowest test-newest test-wheel lint check-deploy image-twice docs dist format bench audit \
	gpu-check fuzz clean one-half other-half

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP)  ## make .venv with the pinned dependencies, and the C kernel

$(STAMP): pyproject.toml constraints.txt $(wildcard src/obfuscatune/protocol/c/*.c)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

demo: setup  ## fine-tune a bundled model on private records, protected
	$(BIN)/obfuscatune demo

test: setup  ## run the fast tests
	+$(call halves,$(BIN),not slow)

test-slow: setup  ## run the slow tests
	+$(call halves,$(BIN),slow)

test-lowest:  ## run the fast tests with the lowest versions that pyproject.toml allows, in build/lowest
	$(PYTHON) -m venv --clear build/lowest
	$(PYTHON) tools/lowest.py > build/lowest/constraints.txt
	build/lowest/bin/python -m pip install --quiet --editable '.[dev]' --constraint build/lowest/constraints.txt
	+$(call halves,build/lowest/bin,not slow)

test-newest:  ## run the fast tests with the newest versions that pyproject.toml allows, in build/newest
	$(PYTHON) -m venv --clear build/newest
	build/newest/bin/python -m pip install --quiet --editable '.[dev]'
	+$(call halves,build/newest/bin,not slow)

one-half:
	$(PYTEST) $(HALF)

other-half:
	$(PYTEST) $(addprefix --ignore=,$(HALF))

lint: setup  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-deploy: setup  ## check what is in deploy/, as far as a machine without a TEE can
	$(BIN)/python -B deploy/check.py

image-twice: setup  ## build twice what goes into the image, and compare the digests
	$(BIN)/python -B deploy/twice.py

docs: setup  ## build the site of docs/ into site/, and check its links; nothing in it is fetched from elsewhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	$(BIN)/python tools/check_site.py site

dist: setup  ## build sdist and wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

test-wheel: dist  ## install the wheel alone into a fresh environment, and run the demo and the compiled part from it
	$(BIN)/python tools/check_wheel.py dist

format: setup  ## format and repair what can be repaired
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  ## run the benchmarks
	$(BIN)/obfuscatune bench

audit: setup  ## attack every profile and say what leaks, in an hour and a quarter; the report is in results/audit
	$(BIN)/obfuscatune audit --out results/audit --workers 2

gpu-check: setup  ## check equality and cost with the worker on a GPU; skipped, saying so, without one
	$(BIN)/python -m obfuscatune.studies.reproduce.gpu_check

fuzz: setup  ## fuzz every parser with atheris, FUZZ_SECONDS (60) each
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]' --constraint constraints.txt
	$(BIN)/python tools/fuzz --seconds $(or $(FUZZ_SECONDS),60)

clean:  ## remove .venv and all caches
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
