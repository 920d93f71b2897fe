# Two commands on a fresh machine with Python 3.11 to 3.13: `make train` and `make test`; a third,
# `make hardware`, compiles the kernels for TPUs and an H100 on a machine that has neither.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKDIR ?= runs/quickstart
PAGE ?= gin_configs/runs/quickstart.gin
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

# Fewer page faults for XLA's temporaries: a fifth of a small model's step on a CPU.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: train test hardware hardware-tpu hardware-cuda peers race compile-reports lint lock clean

# No page faults at all: what is freed stays with the process, which then keeps its peak.
KEEPING_MEMORY := glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0
KEEPING_MEMORY := $(KEEPING_MEMORY):glibc.malloc.trim_threshold=8589934592

train: .venv/base
	$(BIN)/python launch/train.py --gin_file=$(PAGE) --workdir=$(WORKDIR) $(ARGS)

test: .venv/test
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadgroup $(ARGS)

# The lock file pins Python 3.11's wheels; other versions resolve setup.py's ranges.
.venv/base: requirements/base.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
	  $(PIP) -r requirements/base.txt && $(PIP) --no-deps --no-build-isolation -e .; \
	else $(PIP) -e .; fi
	touch $@

.venv/test: .venv/base requirements/test.txt
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
	  $(PIP) -r requirements/test.txt; else $(PIP) -e '.[test]'; fi
	touch $@

# Each compiler has an environment of its own: both register themselves with jax. The suite's own
# conftest stays out, because it wants what these environments lack.
hardware: hardware-tpu hardware-cuda
COMPILES := -m pytest --confcutdir=tests/hardware

hardware-tpu: .venv-tpu/ready
	.venv-tpu/bin/python $(COMPILES) tests/hardware/test_tpu_compiles.py $(ARGS)
	.venv-tpu/bin/python $(COMPILES) tests/hardware/test_tpu_schedules.py $(ARGS)
	.venv-tpu/bin/python $(COMPILES) tests/hardware/test_step_compiles.py $(ARGS)
	.venv-tpu/bin/python $(COMPILES) tests/hardware/test_tpu_overlap.py $(ARGS)
	.venv-tpu/bin/python $(COMPILES) tests/hardware/test_reports.py $(ARGS)

hardware-cuda: .venv-cuda/ready
	.venv-cuda/bin/python $(COMPILES) tests/hardware/test_h100_compiles.py $(ARGS)
	.venv-cuda/bin/python $(COMPILES) tests/hardware/test_h100_overlap.py $(ARGS)
	.venv-cuda/bin/python $(COMPILES) tests/hardware/test_reports.py $(ARGS)

# Our steps and decoding beside PyTorch's, on a machine with nothing else to do: some ten minutes.
peers: .venv-peers/ready

race: export GLIBC_TUNABLES = $(KEEPING_MEMORY)
race: peers
	.venv-peers/bin/python -m benchmarks.train_step --out benchmarks/train_step.md $(ARGS)
	.venv-peers/bin/python -m benchmarks.generate --out benchmarks/generate.md

.venv-tpu/ready .venv-cuda/ready .venv-peers/ready: .venv-%/ready: requirements/%.txt requirements/base.txt requirements/test.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -qq --disable-pip-version-check -r $<
	.venv-$*/bin/python -m pip install -qq --disable-pip-version-check --no-deps \
	  --no-build-isolation -e .
	touch $@

# Compiles every large page for the chips in its name, in an hour or so; PAGES names some of them.
compile-reports: .venv-tpu/ready .venv-cuda/ready
	python3 docs/compile_reports.py $(PAGES)

lint: .venv/test
	$(BIN)/python -m ruff check .

# Resolves setup.py's ranges afresh and pins what came of it.
lock:
	rm -rf .venv && $(PYTHON) -m venv .venv && $(PIP) wheel && $(PIP) -e '.[test]'
	$(BIN)/python requirements/lock.py

clean:
	rm -rf .venv .venv-tpu .venv-cuda .venv-peers build *.egg-info
