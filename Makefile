# Two commands on a fresh machine with Python 3.11 to 3.13: `make train` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKDIR ?= runs/quickstart
PAGE ?= gin_configs/runs/quickstart.gin
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

# Fewer page faults for XLA's temporaries: a fifth of a small model's step on a CPU.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: train test lint lock clean

train: .venv/base
	$(BIN)/python launch/train.py --gin_file=$(PAGE) --workdir=$(WORKDIR) $(ARGS)

test: .venv/test
	$(BIN)/python -m pytest --numprocesses=2 $(ARGS)

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

lint: .venv/test
	$(BIN)/python -m ruff check .

# Resolves setup.py's ranges afresh and pins what came of it.
lock:
	rm -rf .venv && $(PYTHON) -m venv .venv && $(PIP) wheel && $(PIP) -e '.[test]'
	$(BIN)/python requirements/lock.py

clean:
	rm -rf .venv build *.egg-info
