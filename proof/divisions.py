"""Quotients without a division against true ones, by tests/lib/division.cpp."""

import os

from machines import FOLDER, ROOT, build_rules, numbers, run


def compile_division():
    """The program, for the widest instruction set with fma that every tool here knows."""
    flags = f"{build_rules().KERNEL_FLAGS} -O3 -pthread -I{ROOT / 'csrc'}".split()
    x86 = os.uname().machine == "x86_64"
    FOLDER.mkdir(parents=True, exist_ok=True)
    source, program = ROOT / "tests" / "lib" / "division.cpp", FOLDER / "division"
    run("g++", *flags, *(["-mavx2", "-mfma"] if x86 else []), source, "-o", program)
    return {"program": program.name}


def division(*arguments):
    """What the program counted; none may differ."""
    counted = numbers(run(FOLDER / "division", *arguments).splitlines()[-1])
    assert counted["wrong"] == 0 and counted.get("corrected_wrong", 0) == 0, counted
    return counted
