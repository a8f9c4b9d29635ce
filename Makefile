# build: .venv with the package and its development tools     demo: watch a classifier forget     test: everything without a GPU
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
TRITON := triton==3.7.1
WORKERS ?= 2

.PHONY: build demo test test-long lint bench guard kernels gpu clean

build: $(VENV)/.built

$(VENV)/.built: pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH) $(TRITON) "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[eval,frameworks,dev]"
	touch $@

demo: build
	$(BIN)/python -m sfron_fast demo

lint: build
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	SFRON_FAST_TEST_FRAMEWORKS=require $(BIN)/python -m pytest -n $(WORKERS) -m "not long"

test-long: build
	$(BIN)/python -m pytest -m long

bench: build $(VENV)/.peers
	$(BIN)/python -m benchmarks.run

# other packages to compare with; without a network the benchmark does without them, and says so
$(VENV)/.peers: pyproject.toml | build
	$(BIN)/python -m pip install --quiet $(TORCH) --group bench && touch $@ || true

guard: build
	$(BIN)/python -m benchmarks.run --no-plots --out build/guard/now $(BENCH)
	$(BIN)/python -m benchmarks.guard build/guard/now.json benchmarks/results/$(or $(DEVICE),cpu).json --again 2

kernels: build
	$(BIN)/python -m benchmarks.kernels_report
	$(BIN)/python -m benchmarks.triton_report

# On a machine with a GPU, in one go: builds, tests, sanitizes, measures; results in $$OUT (default: build/gpu). It
# installs nothing and needs no network: nvcc, g++ and a python3 with torch >= 2.11, setuptools and ninja; the package's
# other needs (numpy, safetensors) and pytest there too, or unpacked from wheels onto PYTHONPATH
# (`pip download --only-binary=:all: -d wheels pytest`, then `pip install --no-index --target site wheels/*`).
# To prove the stable ABI, first lay a wheel built elsewhere into dist/:
# `USE_CUDA=1 pip wheel --no-build-isolation --no-deps -w dist .`
# Without a GPU it rehearses what it can and says what it skipped.
gpu:
	$(PYTHON) -m benchmarks.gpu_run

clean:
	rm -rf build *.egg-info sfron_fast/*.so
