# The two commands of the README. Both set up a virtual environment inside the clone, from nothing.
# The first tested interpreter that really runs (pyenv's shims exist for versions that are not selected).
PYTHON ?= $(shell for v in 3.11 3.12 3.13; do python$$v -c '' 2>/dev/null && echo python$$v && break; done)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test lint types clean

run: $(VENV)/.train
	$(BIN)/python -m inranker_jax.train --gin_file=gin/small_synth.gin

# A worker that crashes ends the run: pytest-xdist 3.8 may wait for ever after it has replaced one.
test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0 -q

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.%: setup.py $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
