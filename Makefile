# make demo: the main job on the phantom.  make test: all tests.  Both set up .venv first, once.
SHELL := /bin/sh
PYTHON ?= python3
BIN := .venv/bin
export MPLBACKEND := Agg

.PHONY: demo test notebook setup clean

# Large pages for what glibc allocates: fewer page faults, less processor time (docs/performance.md).
demo: export GLIBC_TUNABLES := $(or $(GLIBC_TUNABLES),glibc.malloc.hugetlb=1)
demo: .venv/installed
	$(BIN)/python train.py --config configs/phantom.py --workdir runs/phantom
	$(BIN)/python translate.py

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python & types=$$!; \
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal && \
	{ wait $$types || { echo "pyright found errors, see above"; exit 1; }; }

# Executes the notebook anew, after a change of examples/localize.py or of what it shows.
notebook: .venv/installed-dev
	$(BIN)/jupytext --to ipynb examples/localize.py
	PYTHONPATH="$(CURDIR)" $(BIN)/jupyter-execute --inplace examples/localize.ipynb

setup: .venv/installed

# Relative paths throughout: make cannot hold a path with a space in a target.
.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + "; set PYTHON=python3.12, for example")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	command -v chromium || command -v chromium-browser || command -v google-chrome || $(BIN)/python -m playwright install chromium
	touch $@

clean:
	rm -rf .venv
