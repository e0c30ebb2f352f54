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

from work import HERE, ROOT, Missing, copy_sources

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
    # In the long form and in the short one: one in how many of the recorded calls; between unreadable
    # pages the step from a length to the next, from 64 on (0: none).
    every: tuple[int, int] = (1, 1)
    guard: tuple[int, int] = (0, 0)

    def check(self):
        """Raises where a tool of it is not installed."""
        for tool in (self.compiler, *self.runner[:1]):
            if shutil.which(tool) is None:
                raise Missing(f"{tool} is not installed: make tools installs it, as root")


BUILDS = {
    "clang++ -O3, address sanitizer": Build(
        # g++ vectorizes no loop that it instruments; clang instruments what it has vectorized.
        "clang++",
        "-O3 -g1 -fno-omit-frame-pointer -fsanitize=address -D__SANITIZE_ADDRESS__",
        environments=SOME,
        every=(1, 5),
        guard=(7, 150),
    ),
    "aarch64 g++ -O3": Build(
        "aarch64-linux-gnu-g++",
        "-O3 -static",
        "aarch64",
        ("qemu-aarch64-static",),
        environments=SOME,
        guard=(37, 600),
    ),
    # Steps of 7 from 64 on meet every remainder of 64, the widest step of a loop.
    "g++ -O3": Build("g++", "-O3", guard=(7, 150)),
    "thread and undefined behaviour sanitizers": Build(
        "g++",
        # The check of vptr reads memory through a pipe, in which ThreadSanitizer sees a race.
        "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=thread,undefined "
        "-fno-sanitize=vptr",
        environments=("usual",),
        every=(1, 5),
    ),
    "clang++ -O3": Build("clang++", "-O3"),
    "g++ -O0": Build("g++", "-O0"),
    "valgrind": Build(
        "g++",
        "-O3",
        runner=("valgrind", "--quiet", "--error-exitcode=9"),
        environments=("usual",),  # its machine flushes no denormals
        every=(23, 23),
    ),
}
EMULATED = "clang++, emulated CUDA kernels"
# Their compilers and tools are among those of the others.
SHORT = [name for name in BUILDS if name not in ("clang++ -O3", "g++ -O0")]


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


def folder_of(name):
    return FOLDER / re.sub(r"\W+", "_", f"{BUILDS[name].compiler} {BUILDS[name].flags}")


def compile_driver(name):
    """The driver of a build, and of the others with the same compiler and flags."""
    build, rules, folder = BUILDS[name], build_rules(), folder_of(name)
    if shutil.which(build.compiler) is None:
        return {}  # machine() says so
    folder.mkdir(parents=True, exist_ok=True)
    flags = f"{rules.COMMON_FLAGS} -pthread"
    sources = {f"csrc/{s}": f for s, f in rules.kernel_sources(build.machine).items()}
    sources["proof/driver.cpp"] = rules.KERNEL_FLAGS
    # The objects of the library itself, where this would make the same ones again.
    same = (build.compiler, build.flags) == (rules.find_compiler(), "-O3")
    objects = []
    for source, own in sources.items():
        built = ROOT / "build" / "objects" / f"cpu_{Path(source).stem}.o"
        if same and built.exists() and "dispatch" not in source:  # that one knows the emulator
            objects.append(built)
            continue
        objects.append(folder / f"{Path(source).stem}.o")
        command = f"{build.compiler} {flags} {own} {build.flags}".split()
        run(*command, "-c", ROOT / source, "-o", objects[-1])
    run(*f"{build.compiler} -pthread {build.flags}".split(), *objects, "-o", folder / "driver")
    return {}


def numbers(text):
    return {name: int(n) for name, n in re.findall(r"(\w+) (\d+)(?= |$)", text.strip())}


def version(compiler):
    return run(*compiler.split(), "--version").splitlines()[0]


def machine(name, short):
    """Runs one driver: recorded calls on every instruction set, and between unreadable pages."""
    build = BUILDS[name]
    build.check()
    driver = (*build.runner, folder_of(name) / "driver")
    usual, *others = ({"environment": e} for e in build.environments)
    runs = [usual, *others, {"nontemporal": 1}]
    if short:
        runs = [usual, {"environment": build.environments[-1], "nontemporal": 1}]
    every, step = build.every[short], build.guard[short]
    hashes, calls, guarded = {}, 0, 0
    for isa in run(*driver, "isas").split():
        chosen = [f"isa={isa}", "threads=5", f"every={every}"]
        for options in runs:
            given = [f"{key}={value}" for key, value in options.items()]
            text = run(*driver, "cases", calls_file(short), *chosen, *given)
            calls += numbers(text)["calls"]
            found = re.search(r"hash (\w+)", text)[1]
            assert hashes.setdefault(isa, found) == found, f"{isa}, {options}: another hash"
        if step:
            guarded += numbers(run(*driver, "guard", f"isa={isa}", f"step={step}"))["calls"]
    assert len(set(hashes.values())) == 1, hashes
    return {
        "every": every,
        "calls": calls,
        "guarded": guarded,
        "step": step,
        "callers": ", ".join(
            r.get("environment", "usual") + " past the caches" * ("nontemporal" in r) for r in runs
        ),
        "hashes": hashes,
        "compiler": version(build.compiler),
    }


def emulated(short, compiler="clang++"):
    """An extension by another compiler records the same calls; a driver says whether they are.

    Its operators and its emulated CUDA kernels; each recorded call is compared with the reference too.
    """
    Build(compiler, "").check()
    copy = FOLDER / "emulated"
    shutil.rmtree(copy, ignore_errors=True)
    copy_sources(copy)
    build = ("setup.py", "--quiet", "build_ext", "--inplace")
    chosen = {"CXX": compiler, "FORCE_CPU": "1", "QUANTKIT_BUILD_EMU": "1", "CXXFLAGS": "-O1"}
    run("env", "-C", copy, sys.executable, *build, **chosen)
    library = (copy / "quantkit" / "libquantkit.so").read_bytes()
    assert compiler.strip("+").encode() + b" version" in library, f"{compiler} did not compile it"
    run(
        sys.executable,
        "-c",
        f"import machines; machines.record({short})",
        PYTHONPATH=os.pathsep.join(map(str, (copy / "proof", copy))),
    )
    calls = copy / calls_file(short).relative_to(ROOT)
    driver = folder_of("g++ -O3") / "driver"
    text = run(driver, "cases", calls, "isa=baseline", "threads=2", "every=1")
    calls.unlink()
    return {
        "every": 1,
        "calls": numbers(text)["calls"],
        "hashes": {"cuda_emu": re.search(r"hash (\w+)", text)[1]},
        "compiler": version(compiler),
    }
