# make demo | test | bench | gpu-check | lint | format | clean
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# Two processes, a file in one of them: session fixtures compile once.
PYTEST_ARGS ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: demo test bench gpu-check lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(BIN)/python examples/demo.py

test: $(VENV)/.tested
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.tested
	$(BIN)/python -m pip install -q -e ".[bench]" --no-build-isolation
	$(BIN)/python benchmarks/issue_bound.py
	$(BIN)/python benchmarks/kernels.py --full

gpu-check: $(VENV)/.tested
	$(BIN)/python benchmarks/gpu_check.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/**' 'tests/cpp/*.cpp' 'benchmarks/*.cpp' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/**' 'tests/cpp/*.cpp' 'benchmarks/*.cpp' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist *.egg-info qflux_kernels/*.so $(VENV)/.built $(VENV)/.tested

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: the build compiles against the torch that will load the object.
$(VENV)/.built: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q "setuptools>=77" ninja
	$(BIN)/python -m pip install -q --no-build-isolation -e .
	touch $@

$(VENV)/.tested: $(VENV)/.built
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/.lint: Makefile | $(BIN)/python
	$(BIN)/python -m pip install -q ruff==0.17.6 clang-format==19.1.7
	touch $@
