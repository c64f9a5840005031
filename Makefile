PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/.installed
	$(BIN)/fatezero demo --output out

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadscope

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p .mypy_cache/root && ln -sfn ../.. .mypy_cache/root/fatezero  # the checkout under its package name
	cd .mypy_cache/root && ../../$(BIN)/mypy --config-file ../../pyproject.toml --no-namespace-packages -p fatezero

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build out *.egg-info .pytest_cache .mypy_cache .ruff_cache
