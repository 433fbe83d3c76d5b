# Every target sets up .venv by itself; all it needs is Python 3.11, 3.12 or 3.13 (and a C++ compiler and nvcc for the CUDA extension).
#
#   make demo    photos -> video with the bundled model, into demo/
#   make test    all tests; those for GPUs are skipped with a reason where there is none
#   make lint    ruff and mypy
#   make bench   measurements, on a machine with a GPU
#   make wheel   a wheel in dist/
#
# PYTHON=python3.12 chooses the interpreter, ARGS="..." is passed on: make test ARGS="-k rasterizer"
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint bench wheel clean

demo: $(READY)
	$(BIN)/fvgen demo --output demo --overwrite $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m pytest benchmarks $(ARGS)

wheel: $(READY)
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .
	@ls -l dist/*.whl

clean:
	rm -rf $(VENV) build dist demo out fvgen.egg-info

$(READY): pyproject.toml setup.py tools/setup_venv.sh $(wildcard csrc/*.json csrc/*/*)
	bash tools/setup_venv.sh $(VENV)
	@touch $@
