# build: .venv with the package and its development tools     demo: watch a classifier forget     test: everything without a GPU
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
TRITON := triton==3.7.1
WORKERS ?= 2
CXX_FILES := $(shell find csrc tests/cuda tests/native -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

# with a compiler, an error in a kernel is no warning beside an extension built before
NATIVE := $(if $(shell command -v g++),SFRON_FAST_NATIVE=$${SFRON_FAST_NATIVE:-require})

OLDEST := build/torch-2.11
# Triton 3.6 interprets with NumPy to 2.3 only
OLD := TORCH=torch==2.11.0 TRITON="triton==3.6.0 numpy==2.3.5"

.PHONY: build demo test test-suite test-long test-torch-2.11 lint docs wheel smoke bench guard kernels gpu clean

build: $(VENV)/.built

$(VENV)/.built: pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH) $(TRITON) "setuptools>=77" wheel ninja
	$(NATIVE) $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[eval,frameworks,dev]"
	touch $@

demo: build
	$(BIN)/python -m sfron_fast demo

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

test: lint test-suite

test-suite: build
	SFRON_FAST_TEST_FRAMEWORKS=require $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not long"

test-long: build test-torch-2.11
	$(BIN)/python -m pytest -m long

# The CPU suite on the oldest torch that pyproject.toml promises, and its Triton: built, installed and tested in a copy of
# the checkout, as two extensions of one name cannot lie side by side. The copy's .venv stays for the next time. On
# Linux the registry has torch 2.11 as a CUDA build only, whose libraries come along (2 GB to download, 5 GB on disk):
# the import wants them even without a GPU, and empty stand-ins would be one more thing that differs from what users
# have. Where there is nvcc, the CUDA kernels are built against it too, as on an image for GPUs.
test-torch-2.11:
	mkdir -p $(OLDEST)
	find $(OLDEST) -name .venv -prune -o -type f -name '*.py' -exec rm {} +
	tar --exclude=./build --exclude=./.venv --exclude=./.git --exclude='*.so' -cf - . | tar -xf - -C $(OLDEST)
	SFRON_FAST_NATIVE=require $(MAKE) -C $(OLDEST) build $(OLD)
	$(MAKE) -C $(OLDEST) test-suite $(OLD)

# The site, in build/site: the pages as they lie in the checkout, see mkdocs.yml. A link that leads nowhere is an error;
# nothing is looked up on a network.
docs: $(VENV)/.docs
	rm -rf build/docs
	mkdir -p build/docs/benchmarks
	ln -s $(addprefix $(CURDIR)/,$(wildcard *.md) docs examples) build/docs
	ln -s $(CURDIR)/benchmarks/results build/docs/benchmarks
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

$(VENV)/.docs: pyproject.toml | build
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

# In dist/ the source distribution and, built from it, one wheel for every Python from 3.10 and every torch from 2.11. Its
# manylinux tag says how old a C library it runs on: that of this machine, so release from a manylinux image. USE_CUDA=1
# for one with CUDA kernels.
wheel: $(VENV)/.release
	rm -rf build/dist dist/sfron_fast-*
	PATH="$(abspath $(BIN)):$$PATH" SFRON_FAST_NATIVE=require $(BIN)/python -m build --no-isolation --outdir build/dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist
	$(BIN)/abi3audit --strict dist/*.whl
	$(BIN)/twine check --strict dist/*

$(VENV)/.release: pyproject.toml | build
	$(BIN)/python -m pip install --quiet --group release
	touch $@

# The wheel in dist/ in an environment of its own: make smoke PYTHON=python3.10 TORCH=torch==2.11.0
smoke:
	rm -rf build/smoke
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip install --quiet $(TORCH) dist/*.whl
	cd build/smoke && SFRON_FAST_NATIVE=require bin/python -W error::RuntimeWarning $(CURDIR)/tests/package/smoke.py

bench: build $(VENV)/.peers
	$(BIN)/python -m benchmarks.run $(if $(OUT),--out $(OUT)) $(BENCH)

# other packages to compare with; without a network the benchmark does without them, and says so
$(VENV)/.peers: pyproject.toml | build
	$(BIN)/python -m pip install --quiet $(TORCH) --group bench && touch $@ || true

guard: build
	$(BIN)/python -m benchmarks.run --no-plots --out build/guard/now $(BENCH)
	$(BIN)/python -m benchmarks.tools.guard build/guard/now.json benchmarks/results/$(or $(DEVICE),cpu).json --again 2

kernels: build
	$(BIN)/python -m benchmarks.tools.kernels_table

# On a machine with a GPU: PART=1 builds and tests, PART=2 measures, PART=3 runs the sanitizers and the tests of single
# ops, each within nine minutes; without PART all three. Results in $$OUT (default: build/gpu), at most six files. It
# installs nothing and needs no network: nvcc, g++ and a python3 with torch >= 2.11, setuptools and ninja; the package's
# other needs (numpy, safetensors) and pytest there too, or unpacked from wheels onto PYTHONPATH
# (`pip download --only-binary=:all: -d wheels pytest`, then `pip install --no-index --target site wheels/*`).
# To prove the stable ABI, first lay a wheel built elsewhere into dist/:
# `USE_CUDA=1 pip wheel --no-build-isolation --no-deps -w dist .`
# Without a GPU it rehearses what it can and says what it skipped.
gpu:
	$(PYTHON) -m benchmarks.tools.gpu_run $(if $(PART),--part $(PART))

clean:
	rm -rf build *.egg-info sfron_fast/*.so
