# make help lists what there is. Two targets do everything on a fresh Debian or Ubuntu machine: make demo, make test.

PYTHON ?= python3
BIN := .venv/bin
PRESETS ?= tiny small medium large xl huge
THREADS ?= 2
# GPU drivers get processes of their own in `make test`: they and wasmtime both handle the signals of a process.
# Node, where tools/node.sh put one; MAKEFLAGS is not for the makes that tests run in a bundle's folder.
TEST_ENVIRONMENT = PATH="$(CURDIR)/build/node/node_modules/.bin:$$PATH" MAKEFLAGS=

.PHONY: help env install demo test bench fuzz capacity docs types lint clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

env: .venv/ready ## the virtual environment .venv, with the package in it

.venv/ready: pyproject.toml constraints.txt tools/environment.sh tools/system_packages.sh
	PYTHON=$(PYTHON) tools/system_packages.sh run
	PYTHON=$(PYTHON) tools/environment.sh
	touch $@

install: env ## the command `tinygpt`, in .venv/bin
	$(BIN)/tinygpt --version

demo: env ## compile `small`, train it on text beside PyTorch, read a sample
	$(BIN)/python examples/demo.py

test: env ## everything the tests need, then all tests
	PYTHON=$(PYTHON) tools/system_packages.sh test
	tools/node.sh
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10 -k "not wgsl"
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10 -k wgsl

bench: env ## speed of every preset beside PyTorch's, into docs/performance.md
	$(BIN)/python tools/measure.py speed $(PRESETS) --threads $(THREADS)

capacity: env ## memory of every preset, and the largest in WebAssembly (9 GB, 15 min), into docs/performance.md
	PYTHON=$(PYTHON) tools/system_packages.sh test
	tools/node.sh
	$(BIN)/python tools/measure.py memory
	$(TEST_ENVIRONMENT) $(BIN)/python tools/measure.py capacity --threads $(THREADS)

fuzz: env ## the property tests, long and with new examples each time
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -n 2 -m hypothesis --hypothesis-profile=fuzz

docs: env ## the tables of docs/ that follow from the code
	$(BIN)/python tools/doc_tables.py

types: env ## mypy --strict over all packages
	$(BIN)/python tools/link_packages.py
	$(BIN)/python -m mypy

lint: types ## types, and the rules of the house
	$(BIN)/python -m pytest -q tests/test_house.py

clean: ## everything that was built or measured here, but not the environment
	rm -rf build dist .links .mypy_cache .pytest_cache .hypothesis *.egg-info
