"""What a proof has to do, task by task, and how a process does one."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from functools import cache, cached_property
from multiprocessing import parent_process
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Task:
    """One call of a function of the modules here, with the kernels or with the fallback."""

    part: str
    module: str
    function: str
    args: tuple = ()
    fallback: bool = False
    phase: int = (
        1  # those of one phase run side by side; of phase 0, whenever something is left to do
    )

    @cached_property
    def key(self):
        where = "fallback" if self.fallback else "kernels"
        return f"{where} {self.module}.{self.function}{self.args} {code_of(self.code)[:16]}"

    @property
    def code(self):
        return "tests" if self.part == "tests" else self.module


def hash_of(paths):
    """sha256 over the names and contents of files."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def product_files():
    """What is proved, and the emulator that stands in for a GPU."""
    kinds = {".c", ".cpp", ".h", ".cu", ".cuh", ".py"}
    for folder in ("csrc", "quantkit", "proof/emu"):
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in kinds)
    yield ROOT / "setup.py"


def git(*arguments):
    command = ["git", "-C", ROOT, *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def commit():
    """The commit, and whether the files on disk are it."""
    proved = (
        "csrc",
        "quantkit",
        "tests",
        "proof",
        "benchmarks",
        "setup.py",
        "pyproject.toml",
        "Makefile",
    )
    changed = git("status", "--porcelain", "--", *proved)
    return git("rev-parse", "HEAD") + (", with changes that are not committed" if changed else "")


def provenance(commit, sources):
    """The first lines of a page: of which sources it speaks."""
    yield f"- commit {commit}"
    yield f"- sources {sources[:16]} (sha256 over csrc, quantkit, setup.py and the emulator)"


def copy_sources(folder):
    """What an extension can be built from and tested with, in another place."""
    for name in ("csrc", "quantkit", "tests", "proof"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)


def built_files():
    """What runs: other compilers and flags make others of the same sources."""
    return (ROOT / "quantkit").glob("*.so")


RECORDED = (
    "proof/machines.py",
    "proof/record.py",
    "proof/driver.cpp",
    "proof/recorded.h",
    "proof/sweeps.py",
    "tests/lib/cases.py",
    "tests/lib/generated.py",
)
# What else decides the result of a task.
CODE = {
    "sweeps": ("proof/sweeps.py", "tests/lib/cases.py"),
    "machines": RECORDED,
    "emulated": ("proof/emulated.py", *RECORDED),
    "divisions": ("proof/divisions.py", "proof/machines.py", "tests/lib/division.cpp"),
    "suites": ("proof/suites.py", "tests/lib/generated.py", "tests/lib/cases.py"),
    "tests": (
        "tests/**/*.py",
        "proof/suites.py",
        "proof/machines.py",
        "benchmarks/*.py",
        "Makefile",
        "pyproject.toml",
    ),
}


def code_now(module):
    return hash_of(path for pattern in CODE[module] for path in ROOT.glob(pattern))


code_of = cache(code_now)  # when it was first asked for


# ---- what there is to do --------------------------------------------------------------------------


def sweep_tasks(short):
    """The exhaustive sweeps; in the short form, samples of each."""
    import sweeps as s

    every = 256 if short else 1
    for which in range(len(s.FLOAT_SETS)):
        for index in range(s.FLOAT_SLICES):
            yield "floats", (which, index, every)
    for which in range(len(s.DYNAMIC_SETS)):
        for index in range(s.FLOAT_SLICES):
            yield "dynamic", (which, index, every)
    for dtype in ("float16", "bfloat16"):
        for granularity in s.GRANULARITIES:
            for batch in range(3 if short else 80):
                yield "halves", (dtype, granularity, batch)
        for batch in range(1 if short else 32):
            yield "dynamic_halves", (dtype, batch)
        for choice in range(len(s.CHOICES)):
            for begin in range(0, 65536, 16384 if short else 2048):
                yield "pairs", (dtype, choice, begin, begin + 2048)
    for code in ("int8", "uint8", "int16"):
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            for batch in range(1 if short else 64):
                yield "codes", (code, dtype, batch)
    for choice in range(len(s.CHOICES)):
        for exponent in range(len(s.EXPONENTS)):
            for part in range(1 if short else 16):
                yield "extents", (choice, exponent, part, 32 if short else 16)


def tasks_of(short, seed):
    """The longest first: nothing waits for them at the end."""
    from machines import BUILDS, SHORT

    yield Task("machines", "machines", "record", (short,), phase=0)
    yield Task("division", "divisions", "compile_division", phase=0)
    if not short:  # make test and make sanitize run these
        yield Task("tests", "suites", "large", (("tests/test_large.py",),))
        for files in (
            ("tests/test_environment.py", "tests/test_threads.py"),
            ("tests/test_allocation.py", "tests/test_memory.py"),
            (
                "tests/test_bad_input.py",
                "tests/test_spoiled_calls.py",
                "tests/test_errors.py",
                "tests/test_hostile_files.py",
            ),
        ):
            yield Task("tests", "suites", "tests", (files,))
        yield Task("tests", "suites", "sanitized", (("not cuda_emu or float32",),), phase=2)
    for name in SHORT if short else BUILDS:
        yield Task("machines", "machines", "machine", (name, short))
    # Another phase: it builds a driver of machines again.
    clang = ("clang++, emulated CUDA kernels", "clang++", short)
    yield Task("machines", "emulated", "machine", clang, phase=2)

    for name, args in sweep_tasks(short):
        yield Task(name, "sweeps", name, args)
    for name, args in sweep_tasks(short):
        yield Task(name, "sweeps", name, args, fallback=True)
    for batch in range(2 if short else 40):
        yield Task(
            "division", "divisions", "division", (100 if short else 300, seed % 2**30 + batch)
        )
    yield Task("division", "divisions", "division", ("all", 3 if short else 24, seed % 1000))
    yield Task("division", "divisions", "division", ("half",))
    for batch in range(2 if short else 1000):
        yield Task("generated", "suites", "generated", (500 if short else 1000, seed + batch))


# ---- doing it --------------------------------------------------------------------------------------


def prepare(fallback, in_pool=True):
    """A process of the pool: one thread, and the fallback where it is asked for."""
    if in_pool:  # an interruption is the parent's to handle, whose end is this one's
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=end_with, args=(parent_process(),), daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    if fallback:
        os.environ |= {"QUANTKIT_REFERENCE": "1", "QUANTKIT_ISA": ""}
    sys.path[:0] = [str(HERE), str(ROOT)]
    import torch

    torch.set_num_threads(1)


def end_with(process):
    process.join()
    os._exit(1)


def perform(task):
    module = __import__(task.module)
    start = time.perf_counter()
    try:
        result = getattr(module, task.function)(*task.args)
    except Exception as error:
        result = {"error": "".join(traceback.format_exception(error))}
    return result | {"seconds": round(time.perf_counter() - start, 2)}
