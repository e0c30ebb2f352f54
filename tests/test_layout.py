"""Layouts (csrc/layout.h) made by hand, against brute force: also those that no operator asks for yet."""

import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SEED = int(os.environ["QUANTKIT_SEED"])
KINDS = ("borders apart", "cut", "expanded", "lower rank", "nested", "packed", "repeated")
KINDS += ("repeats", "short", "slabs", "tiled")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """tests/lib/layout.cpp, compiled as the library's own sources are."""
    flags = runpy.run_path(str(ROOT / "setup.py"))["KERNEL_FLAGS"]
    program = tmp_path_factory.mktemp("layout") / "layout"
    sources = [ROOT / "tests" / "lib" / "layout.cpp", ROOT / "csrc" / "layout.cpp"]
    compiler = os.environ.get("CXX", "g++").split()
    command = [*compiler, *flags.split(), "-O1", "-I", ROOT / "csrc", *sources, "-o", program]
    subprocess.run(command, check=True)
    return program


@pytest.mark.parametrize(
    "cases", [2000, pytest.param(60_000, marks=pytest.mark.full)], ids=["daily", "full"]
)
def test_every_element_has_the_offsets_of_the_definition(program, cases):
    command = [program, str(cases), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"seed {SEED}\n{done.stdout}")
    counted = {name: int(n) for name, n in re.findall(r"^([\w ]+): (\d+)$", done.stdout, re.M)}
    assert done.returncode == 0 and counted["mistakes"] == 0
    assert all(counted[kind] > 0 for kind in KINDS) and counted["cases"] > cases
