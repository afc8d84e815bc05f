# `make demo` and `make test` do all the set-up; they need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A process for each core; the tests of a file share what it makes, so they stay together. In the order of folders, in which
# the files of few and long tests come first: the other order ends with one of them, alone.
PARALLEL := -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder
LOWEST ?= .venv-lowest
export HF_HUB_OFFLINE = 1
export GOMP_SPINCOUNT = 1000
export NO_MKDOCS_2_WARNING = 1

.PHONY: demo test test-slow test-lowest mutation lint format docs notebooks licenses wheel setup benchmark clean

demo: $(VENV)/.installed
	$(BIN)/esd-lora demo -o out/demo --force

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) -m slow

# The lowest versions that pyproject.toml allows, in an environment of their own; minutes, so not for every change.
test-lowest: $(LOWEST)/.dev
	$(LOWEST)/bin/python -m pytest -m "not slow" tests/unit tests/integration

# What no test notices, where there is mathematics; an hour or so.
mutation: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutation.py --out benchmarks/mutation.md

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

# What the notebooks of the documentation print, kept anew.
notebooks: $(VENV)/.dev
	$(BIN)/python tests/notebooks.py

licenses: $(VENV)/.dev
	$(BIN)/python benchmarks/licenses.py

# What is published: both archives, their sizes, and the tests of what is in them and of the wheel installed alone.
wheel: $(VENV)/.dev
	rm -rf dist
	$(BIN)/hatchling build -d dist
	du -h dist/*
	$(BIN)/python -m pytest tests/unit/test_packaging.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The tables of README and docs/performance.md, made anew: about half an hour on two cores.
benchmark: $(VENV)/.dev
	$(BIN)/python benchmarks/everything.py

setup: $(VENV)/.dev

# constraints.txt pins torch to the build the project is tested with.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(LOWEST)/.dev: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) out build dist .cache
