"""The parts of make proof: the tasks of each, and the files that decide their results."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import sweeps as s
from machines import BUILDS, EMULATED, SHORT, folder_of
from work import ROOT, Task, drawn_seed

SWEEPS = ("proof/sweeps.py", "proof/covered.py", "proof/formulas.py", "tests/lib/cases.py")
FORMATS, FORMAT_SETS = tuple(s.OF_NAME), range(len(s.FORMAT_SETS))
HALVES, CHOICES = ("float16", "bfloat16"), range(len(s.CHOICES))
# What `make sanitize` runs.
MAKEFILE = (ROOT / "Makefile").read_text().replace("\\\n", "")
SANITIZED = re.search(r"^SANITIZED := (.*)$", MAKEFILE, re.MULTILINE)[1].split()
PARTS = {}


@dataclass(frozen=True)
class Part:
    tasks: Callable[[bool], Iterator[Task]]  # of the short form, or of the long one
    code: tuple[str, ...]  # what decides the results beside the product


def part(*code):
    def add(tasks):
        PARTS[tasks.__name__] = Part(tasks, code)
        return tasks

    return add


def sweep(name, *arguments, fallback=False):
    """One task for each combination of arguments."""
    for args in product(*arguments):
        yield Task(name, "sweeps", name, args, fallback)


@part(
    *SWEEPS,
    "proof/machines.py",
    "proof/record.py",
    "proof/driver.cpp",
    "proof/recorded.h",
    "tests/lib/generated.py",
)
def machines(short):
    """The kernels by other compilers, for other machines, under tools that watch memory."""
    builds = SHORT if short else BUILDS
    yield Task("record", "machines", "record", (short,), phase=0)
    for name in {folder_of(name): name for name in builds}.values():
        yield Task("compile", "machines", "compile_driver", (name,), phase=0)
    yield Task(EMULATED, "machines", "emulated", (short,))
    for name in builds:
        yield Task(name, "machines", "machine", (name, short))


@part(*SWEEPS)
def samples(short):
    """A little of every sweep, by the kernels and by the fallback."""
    for own in ({"fallback": False}, {"fallback": True}):
        slices = range(s.FLOAT_SLICES)
        yield from sweep("floats", range(len(s.FLOAT_SETS)), slices, (256,), **own)
        yield from sweep("dynamic", range(len(s.DYNAMIC_SETS)), slices, (256,), **own)
        yield from sweep("halves", HALVES, s.GRANULARITIES, range(3), **own)
        yield from sweep("dynamic_halves", HALVES, (0,), **own)
        for begin in range(0, 65536, 16384):
            yield from sweep("pairs", HALVES, CHOICES, (begin,), (begin + 2048,), **own)
        yield from sweep("codes", s.CODE_NAMES, s.FLOAT_NAMES, (0,), **own)
        yield from sweep("extents", CHOICES, range(len(s.EXPONENTS)), (0,), (32,), **own)
        yield from sweep("format_samples", FORMAT_SETS, **own)
        yield from sweep("format_draws", FORMAT_SETS, **own)
        yield from sweep("format_sums", FORMAT_SETS, **own)
        yield from sweep("format_codes", FORMATS, (0,), **own)
        yield from sweep("format_scales", range(len(s.SCALE_SETS)), **own)
        yield from sweep("format_chosen", FORMATS, **own)


@part(*SWEEPS)
def float32(short):
    """Every float32 under given parameters; of sets with no loop of their own one chunk in 16."""
    for which in range(0 if short else len(s.FLOAT_SETS)):
        every = (1 if which in s.WHOLE else 16,)
        yield from sweep("floats", (which,), range(s.FLOAT_SLICES), every)


@part(*SWEEPS)
def formats(short):
    """Every float32 in each float format, one chunk in 16 in others; every code of each format."""
    if short:
        return
    for which in FORMAT_SETS:
        every = (1 if which in s.EVERY_FORMAT_FLOAT else 16,)
        yield from sweep("format_floats", (which,), range(s.FLOAT_SLICES), every)
    yield from sweep("format_codes", FORMATS, range(64))


@part(*SWEEPS, "proof/divisions.py", "proof/machines.py", "tests/lib/division.cpp")
def halves(short):
    """Every half precision number and every code under given parameters; divisors of float32."""
    seed = drawn_seed()
    yield Task("division", "divisions", "compile_division", phase=0)
    if not short:
        yield from sweep("halves", HALVES, s.GRANULARITIES, range(80))
        yield from sweep("codes", s.CODE_NAMES, s.FLOAT_NAMES, range(64))
    for batch in range(2 if short else 40):
        yield Task("division", "divisions", "division", (100 if short else 300, seed + batch))
    yield Task("division", "divisions", "division", ("all", 3 if short else 24, seed % 1000))
    yield Task("division", "divisions", "division", ("half",))


@part(*SWEEPS)
def chosen(short):
    """Parameters that are chosen, and what is quantized with them."""
    if short:
        return
    yield from sweep("dynamic", range(len(s.DYNAMIC_SETS)), range(s.FLOAT_SLICES), (1,))
    yield from sweep("dynamic_halves", HALVES, range(32))
    for begin in range(0, 65536, 2048):
        yield from sweep("pairs", HALVES, CHOICES, (begin,), (begin + 2048,))
    yield from sweep("extents", CHOICES, range(len(s.EXPONENTS)), range(16), (16,))


@part("proof/suites.py", "tests/lib/generated.py", "tests/lib/cases.py")
def generated(short):
    """Arguments that hypothesis draws, on every instruction set."""
    seed, count = drawn_seed(), 500 if short else 1000
    for batch in range(2 if short else 100):
        yield Task("generated", "suites", "generated", (count, seed + batch))


@part(
    "proof/suites.py",
    "tests/conftest.py",
    "tests/lib/*.py",
    "tests/test_large.py",
    *(f"tests/test_{name}.py" for name in SANITIZED),
    "benchmarks/quant_tool.py",
    "Makefile",
    "pyproject.toml",
)
def tests(short):
    """Tensors of more than 2^31 elements; the kernels' daily tests under sanitizers."""
    if not short:
        yield Task("large", "suites", "large")
        selection = "not cuda_emu and (kernels or out or generated)"
        yield Task("sanitized", "suites", "sanitized", (selection,))
