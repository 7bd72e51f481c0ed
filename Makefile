# Two commands a newcomer needs: `make demo` and `make test`. Each sets up .venv first; nothing else to install.
PYTHON ?= python3
# A CPU build is enough; on a GPU machine give the build that fits it: make test TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
NATIVE := setup.py $(wildcard csrc/*.* csrc/cpu/*.*)

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed
	$(BIN)/synpo demo

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python -m bench

# torch comes first, and the build is not isolated from it: csrc compiles against the headers of the torch that will load it.
$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) "setuptools>=77" wheel
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info synpo_kernels/*.so
