# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check smoke bench clean

demo: $(VENV)/installed
	$(BIN)/antidiffusion demo -o demo

# The tests' models are so small that a second thread only waits; a second process does not.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every part of the benchmark once, on the embedded model.
smoke: $(VENV)/installed-dev
	rm -rf smoke
	$(BIN)/antidiffusion bench --smoke -o smoke --jobs 2
	$(BIN)/antidiffusion report smoke/rows.jsonl -o smoke/report.html

bench: $(VENV)/installed-dev
	$(BIN)/antidiffusion bench -o bench --jobs 2
	$(BIN)/antidiffusion report bench/rows.jsonl -o bench/report.html --overwrite

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo smoke bench
