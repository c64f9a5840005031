PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-host test-all lint gpu gpu-train gpu-wheels gpu-report clean

demo: .venv/.installed
	$(BIN)/fatezero demo --output out

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadscope

test: .venv/.installed
	$(PYTEST) --ignore tests/comfyui

test-host: .venv/.installed  # in a real ComfyUI
	$(PYTEST) tests/comfyui

test-all: .venv/.installed  # slow tests too, in every ComfyUI of COMFYUI_PATH
	$(PYTEST) -m ""

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p .mypy_cache/root && ln -sfn ../.. .mypy_cache/root/fatezero  # the checkout under its package name
	cd .mypy_cache/root && ../../$(BIN)/mypy --config-file ../../pyproject.toml --no-namespace-packages -p fatezero

# Installs nothing: uses the packages of the machine and those of gpu-wheels.
RUN = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
FOLDER ?= out/gpu

gpu:  # make gpu OPTIONS="--tiny --device cpu"
	$(RUN) scripts/gpu.py --out $(FOLDER) $(OPTIONS)

gpu-train:  # make gpu-train FOLDER=out/world2 OPTIONS="--minutes 3"
	$(RUN) scripts/gpu_train.py --out $(FOLDER) $(OPTIONS)

gpu-wheels:
	$(RUN) scripts/gpu_wheels.py

gpu-report:  # make gpu-report FOLDER=out/gpu
	$(RUN) scripts/gpu_report.py $(FOLDER)

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build out *.egg-info .pytest_cache .mypy_cache .ruff_cache
