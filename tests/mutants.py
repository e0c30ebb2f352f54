"""Planted mistakes: each is patched into a copy of the sources, built, and must fail the tests that are named.

python tests/mutants.py [NAME ...]: all, or some. Fails if a mistake survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("tests/test_kernels.py", "-k", "cuda_emu")
FAR = ("tests/test_cuda.py", "-k", "offsets_beyond_32_bits and cuda_emu")


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    text: str  # once in the file
    becomes: str
    tests: tuple[str, ...] = KERNELS


NUMERICS = "csrc/numerics.h"
MEMORY = "csrc/cuda/memory.cuh"
ELEMENTWISE = "csrc/cuda/elementwise.cuh"
DYNAMIC = "csrc/cuda/dynamic.cuh"
RUN = "csrc/cuda/run.cuh"

MUTANTS = (
    Mutant(
        "reciprocal for division, given parameters",
        ELEMENTWISE,
        "Wide<D>(widen(x)) / s.scale",
        "Wide<D>(widen(x)) * (Wide<D>(1) / s.scale)",
    ),
    Mutant(
        "reciprocal for division, chosen parameters",
        DYNAMIC,
        "W(widen(x)) / p.scale;",
        "W(widen(x)) * (W(1) / p.scale);",
    ),
    Mutant(
        "half away from zero",
        NUMERICS,
        "return clamp(v, q_min, q_max) + Shifter<V>::value;",
        "return clamp(V(__builtin_round(v)), q_min, q_max) + Shifter<V>::value;",
    ),
    Mutant("lost tail, given parameters", ELEMENTWISE, "      if (!a.ragged) return;", "      return;"),
    Mutant("lost tail, reduction", DYNAMIC, "for_inside<V>(first_of(u), a.n,", "for_inside<V>(first_of(u), a.n - 1,"),
    Mutant("lost tail, rows", DYNAMIC, "for_inside<V>(first_of(t, u), set.n, body);",
           "for_inside<V>(first_of(t, u), set.n - 1, body);"),
    Mutant("lost head", MEMORY, "i = first < 0 ? 0 : first;", "i = first < 0 ? 1 : first;"),
    Mutant("no vector for the head of a row", RUN, "(aligned ? 0 : width - 1)", "0"),
    Mutant("rows between aligned ones taken for whole", RUN, "levels[k].step[o] % width == 0;", "true;"),
    Mutant("wrong shuffle distance", DYNAMIC, "distance = team / 2; distance > 0", "distance = team / 4; distance > 0"),
    Mutant("missing barrier before the block's extrema", DYNAMIC, "  __syncthreads();\n  if (thread < kWarp) {",
           "  if (thread < kWarp) {"),
    Mutant("missing barrier before the parameters", DYNAMIC,
           "      __syncthreads();\n      scale = chosen[0];", "      scale = chosen[0];"),
    Mutant("missing barrier between columns", DYNAMIC, "    __syncthreads();\n    // Each thread joins some columns.",
           "    // Each thread joins some columns."),
    Mutant("divergent barrier", DYNAMIC, "    if (team > kWarp) {\n      if (threadIdx.x == 0) {",
           "    if (team > kWarp && set.aligned) {\n      if (threadIdx.x == 0) {"),
    Mutant("NaN rule lost, given parameters", ELEMENTWISE, "      nan = v != v;", "      nan = false;"),
    Mutant("NaN rule lost, chosen parameters", DYNAMIC, "(quotient != quotient) | (p.zero_point != p.zero_point)",
           "quotient != quotient"),
    Mutant("32-bit index", MEMORY, "at.of[o] += levels[k].step[o] * index;",
           "at.of[o] += int32_t(levels[k].step[o]) * index;", FAR),
    Mutant("32-bit offset within a set", MEMORY, "    at += levels[k].step[o] * index;",
           "    at += int32_t(levels[k].step[o] * index);", FAR),
    Mutant("read past the end", MEMORY, "first >= 0 && first + V <= n;", "first >= 0 && first < n;"),
    Mutant("misaligned vector access", MEMORY,
           "return step == 1 && reinterpret_cast<uintptr_t>(p) % Vector<T, V>::kPiece == 0;",
           "return step == 1;"),
    Mutant("strides taken for contiguous", MEMORY,
           "return step == 1 && reinterpret_cast<uintptr_t>(p) % Vector<T, V>::kPiece == 0;",
           "return reinterpret_cast<uintptr_t>(p) % Vector<T, V>::kPiece == 0;"),
    Mutant("only the first turn of the grid", ELEMENTWISE,
           "item < a.rows * a.parts; item += t.stride) {", "item < a.rows * a.parts; item += a.rows * a.parts) {"),
    Mutant("parts of a set that do not meet", DYNAMIC,
           "  for (int64_t j = part * each + int(threadIdx.x); j < end; j += kHeld * kThreads) {",
           "  for (int64_t j = part * each + part + int(threadIdx.x); j < end; j += kHeld * kThreads) {"),
    Mutant("missing barrier between turns of a reduction", DYNAMIC,
           "    __syncthreads();  // the next turn writes what this one's first warp reads\n", ""),
    Mutant("more threads than a kernel is compiled for", RUN, "whole < kMostThreads ? whole : kMostThreads", "whole < 1024 ? whole : 1024"),
    Mutant("parts beyond the second", DYNAMIC, "part = item - index * a.parts;", "part = (item - index * a.parts) % 2;"),
    Mutant("a launch on another stream", RUN, "finish_kernel<X, P>, parameters, kThreads, stream, a);",
           "finish_kernel<X, P>, parameters, kThreads, nullptr, a);"),
    Mutant("a product for scales of more bits", NUMERICS, "& (rounded<T>(scale) == scale) ?", "?"),
    Mutant("a product beside fractions", NUMERICS, "has_reciprocal(scale) & integer &", "has_reciprocal(scale) &"),
    Mutant("scratch not cleared", RUN, "const char* error = launch<SetArgs>(clear_kernel<Bits>, parameters, kThreads, stream, a);",
           "const char* error = nullptr;"),
    Mutant("zero point not rounded to half precision", ELEMENTWISE, "number<D, true>(a.add", "number<D, false>(a.add"),
    Mutant("zero point of the CPU not rounded", RUN, "numbers_of(e.add_zero_point, e.add_type)", "numbers_of(e.add_zero_point)"),
    Mutant("the gradient outside the limits", ELEMENTWISE, "return inside ? y : bit_cast<Y>", "return true || inside ? y : bit_cast<Y>"),
)  # fmt: skip


def run(command, folder, **options):
    env = {k: v for k, v in os.environ.items() if not k.startswith("QUANTKIT_")}
    env |= {"FORCE_CPU": "1", "QUANTKIT_BUILD_EMU": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, **options)


def build(folder):
    return run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], folder)


def check(mutant, folder, seconds):
    """(whether the tests caught it, how); right sources take so many seconds."""
    file = folder / mutant.file
    right = file.read_text()
    assert right.count(mutant.text) == 1, f"{mutant.name}: its text is in {mutant.file} not once"
    file.write_text(right.replace(mutant.text, mutant.becomes))
    try:
        done = build(folder)
        assert done.returncode == 0, f"{mutant.name} does not compile:\n{done.stderr}"
        command = [sys.executable, "-m", "pytest", "-x", "--tb=line", *mutant.tests]
        try:
            done = run(command, folder, timeout=60 + 4 * seconds)
        except subprocess.TimeoutExpired:
            return False, "did not end"  # a slow machine, for all that is known
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        if done.returncode == 1 and failed:
            return True, failed[0].removeprefix("FAILED ").split(" - ")[0]
        if done.returncode == 0:
            return False, ""
        raise RuntimeError(f"{mutant.name}: pytest ended with {done.returncode}\n{done.stdout}")
    finally:
        file.write_text(right)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="names, or the beginnings of some")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.names or m.name.startswith(tuple(args.names))]
    if not chosen:
        parser.error(f"no mutant is called {' or '.join(args.names)}")
    survivors = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("csrc", "quantkit", "tests"):
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder / name)
        done = build(folder)
        assert done.returncode == 0, done.stderr
        seconds = {}
        for tests in {m.tests for m in chosen}:  # right sources must pass what wrong ones fail
            start = time.monotonic()
            done = run([sys.executable, "-m", "pytest", "-x", *tests], folder)
            assert done.returncode == 0, done.stdout
            seconds[tests] = time.monotonic() - start
        for mutant in chosen:
            start = time.monotonic()
            caught, how = check(mutant, folder, seconds[mutant.tests])
            result = "caught" if caught else "SURVIVED"
            took = f"{time.monotonic() - start:.0f} s"
            print(f"{result}  {mutant.name}  ({took})  {how}", flush=True)
            survivors += [] if caught else [mutant.name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
