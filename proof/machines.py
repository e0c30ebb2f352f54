"""The torch-free driver, built by other compilers, for other machines, with sanitizers, under valgrind.

Every build runs the same recorded calls: the bits must be the recorded ones, so all hashes are equal.
"""

import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FOLDER = ROOT / "build" / "proof"
# Callers whose floating-point environment is not the usual one.
ENVIRONMENTS = ("usual", "flushing", "downward", "upward", "to zero")
SOME = ("usual", "upward")  # where a run takes long


@dataclass(frozen=True)
class Build:
    """One driver: who compiles it, for which machine, and what it runs under."""

    compiler: str
    flags: str
    machine: str = field(default_factory=platform.machine)
    runner: tuple[str, ...] = ()
    environments: tuple[str, ...] = ENVIRONMENTS  # of the callers
    packages: str = ""  # Debian's, where the compiler or the runner is missing
    every: int = 1  # of the recorded calls
    guard: int = 0  # lengths from 64 on by such steps; 0: no guard pages

    def missing(self):
        tools = (self.compiler, *self.runner[:1])
        return [tool for tool in tools if shutil.which(tool) is None]


SANITIZED = "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all"
AARCH64 = {
    "machine": "aarch64",
    "environments": SOME,
    "runner": ("qemu-aarch64-static",),
    "packages": "g++-aarch64-linux-gnu qemu-user-static",
}
BUILDS = {
    "g++ -O3": Build("g++", "-O3", guard=1),
    "g++ -O2": Build("g++", "-O2"),
    "g++ -O0": Build("g++", "-O0"),
    "clang++ -O3": Build("clang++", "-O3", packages="clang", guard=7),
    "address and undefined behaviour sanitizers": Build(
        "g++", f"{SANITIZED} -fsanitize=address,undefined", environments=SOME, guard=150
    ),
    # g++ vectorizes no loop that it instruments; clang instruments what it has vectorized.
    "clang++ -O3, address sanitizer": Build(
        "clang++",
        "-O3 -g1 -fno-omit-frame-pointer -fsanitize=address -D__SANITIZE_ADDRESS__",
        environments=SOME,
        packages="clang libclang-rt-dev",
        guard=7,
    ),
    "thread sanitizer": Build("g++", f"{SANITIZED} -fsanitize=thread", environments=SOME),
    "valgrind": Build(
        "g++",
        "-O2 -g1",
        runner=("valgrind", "--quiet", "--error-exitcode=9"),
        environments=("usual",),  # its machine flushes no denormals
        packages="valgrind",
        every=23,
    ),
    "aarch64 g++ -O3": Build("aarch64-linux-gnu-g++", "-O3 -static", **AARCH64, guard=37),
    "aarch64 g++ -O0": Build("aarch64-linux-gnu-g++", "-O0 -static", **AARCH64),
}
SHORT_STEP = 75  # of the lengths between unreadable pages
SHORT = [name for name in BUILDS if name not in ("g++ -O2", "aarch64 g++ -O0")]


@cache
def build_rules():
    """setup.py, for its compiler flags."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command, timeout=3600, **environment):
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=own | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    if done.returncode != 0:
        shown = " ".join(str(part) for part in command)
        raise AssertionError(f"{shown}\n{done.stdout}{done.stderr}\nexit status {done.returncode}")
    return done.stdout


def calls_file(short):
    return FOLDER / f"calls-{'short' if short else 'long'}.bin"


def record(short):
    """Has the emulator of the development build record the calls."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    partial = calls_file(short).with_suffix(".partial")
    text = run(
        sys.executable,
        HERE / "record.py",
        9 if short else 1,
        QUANTKIT_ISA="cuda_emu",
        QUANTKIT_EMU_RECORD=str(partial),
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
    )
    partial.replace(calls_file(short))
    return {"megabytes": calls_file(short).stat().st_size >> 20, "results": text.strip()}


def compile_driver(name):
    build, rules = BUILDS[name], build_rules()
    folder = FOLDER / re.sub(r"\W+", "_", name)
    folder.mkdir(parents=True, exist_ok=True)
    flags = f"{rules.COMMON_FLAGS} -pthread"
    sources = {f"csrc/{s}": f for s, f in rules.kernel_sources(build.machine).items()}
    sources["proof/driver.cpp"] = rules.KERNEL_FLAGS
    objects = []
    for source, own in sources.items():
        objects.append(folder / f"{Path(source).stem}.o")
        command = f"{build.compiler} {flags} {own} {build.flags}".split()
        run(*command, "-c", ROOT / source, "-o", objects[-1])
    driver = folder / "driver"
    run(*f"{build.compiler} -pthread {build.flags}".split(), *objects, "-o", driver)
    return driver


def numbers(text):
    return {name: int(n) for name, n in re.findall(r"(\w+) (\d+)(?= |$)", text.strip())}


def caller_of(environment="usual", streams=0):
    return environment + (" (past the caches)" if streams else "")


def machine(name, short):
    """Builds one driver and runs it: recorded calls on every instruction set, guard pages."""
    build = BUILDS[name]
    if build.missing():
        raise AssertionError(
            f"{', '.join(build.missing())}: not here; apt-get install {build.packages}"
        )
    driver = (*build.runner, compile_driver(name))
    usual, *others = ({"environment": e} for e in build.environments)
    runs = [usual, *others, {"streams": 1}]
    if short:
        runs = [usual, {"environment": build.environments[-1], "streams": 1}]
    step = max(SHORT_STEP, build.guard) if short else build.guard
    hashes, calls, guarded = {}, 0, 0
    for isa in run(*driver, "isas").split():
        chosen = [f"isa={isa}", "threads=5", f"every={build.every}"]
        for options in runs:
            given = [f"{key}={value}" for key, value in options.items()]
            text = run(*driver, "cases", calls_file(short), *chosen, *given)
            calls += numbers(text)["calls"]
            found = re.search(r"hash (\w+)", text)[1]
            assert hashes.setdefault(isa, found) == found, f"{isa}, {options}: another hash"
        if build.guard:
            guarded += numbers(run(*driver, "guard", f"isa={isa}", f"step={step}"))["calls"]
    assert len(set(hashes.values())) == 1, hashes
    return {
        "every": build.every,
        "calls": calls,
        "guarded": guarded,
        "step": step,
        "callers": [caller_of(**options) for options in runs],
        "hashes": hashes,
        "compiler": run(build.compiler, "--version").splitlines()[0],
    }
