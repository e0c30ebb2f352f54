"""Quotients by multiplications and fmas against the true ones, over whole ranges of floats.

QUANTKIT_DIVISION_SCALES sets how many scales are swept: 100, of which `make bench` makes 20,000
and the proof 12,000.
"""

import os
import platform
import re
import subprocess
from pathlib import Path

import pytest

import quantkit

ROOT = Path(__file__).resolve().parent.parent
SEED = int(os.environ.get("QUANTKIT_DIVISION_SEED", "0"))
SCALES = int(os.environ.get("QUANTKIT_DIVISION_SCALES", "100"))
X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(scope="module")
def division(tmp_path_factory):
    if X86 and "avx2" not in quantkit.backend().isas:
        pytest.skip("this machine has no fma, and the kernels divide")
    program = tmp_path_factory.mktemp("division") / "division"
    flags = "-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -pthread"
    target = ["-mavx2", "-mfma"] if X86 else []
    compiler = os.environ.get("CXX", "g++").split()
    source = ROOT / "tests" / "lib" / "division.cpp"
    command = [*compiler, *flags.split(), *target, "-I", ROOT / "csrc", source, "-o", program]
    subprocess.run(command, check=True)
    return program


def swept(program, *arguments):
    """What the program counted, by name."""
    command = [program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    counted = {name: int(n) for name, n in re.findall(r"(\w+) (\d+)", done.stdout)}
    print(f"seed {SEED}: {counted}")
    return counted


def test_every_significand(division):
    counted = swept(division, SCALES, SEED)
    assert counted["wrong"] == 0 and counted["scales"] == SCALES + counted["kept"]
    # Most scales multiply; some are refused, and rightly: the sweep finds the x that would differ.
    # Of the kept ones five multiply: the borders, 1 and 1 / 127.
    refused = counted["scales"] - counted["accepted"]
    assert 0 < refused - (counted["kept"] - 5) < max(SCALES // 8, 30)
    assert counted["refused_wrong"] >= refused
    assert counted["corrected_wrong"] == 0


def test_every_float(division):
    counted = swept(division, "all", max(SCALES // 500, 2), SEED)
    assert counted["wrong"] == 0 and counted["accepted"] > 0
    assert counted["corrected_wrong"] == 0


def test_every_half_precision_pair(division):
    counted = swept(division, "half")
    assert counted == {"pairs": 4 * (2**20 + 2**14), "wrong": 0}
