"""What other programs of the project prove: divisions, generated cases, test files of the long form."""

import os
import re
import sys

from machines import FOLDER, ROOT, build_rules, numbers, run

sys.path.insert(0, str(ROOT / "tests"))


def compile_division():
    """tests/division.cpp for the widest instruction set with fma that every tool here knows."""
    flags = f"{build_rules().KERNEL_FLAGS} -O3 -pthread -I{ROOT / 'csrc'}".split()
    x86 = os.uname().machine == "x86_64"
    FOLDER.mkdir(parents=True, exist_ok=True)
    source, program = ROOT / "tests" / "division.cpp", FOLDER / "division"
    run("g++", *flags, *(["-mavx2", "-mfma"] if x86 else []), source, "-o", program)
    return {"program": program.name}


def division(*arguments):
    """Quotients without a division against true ones; the program counts those that differ."""
    counted = numbers(run(FOLDER / "division", *arguments).splitlines()[-1])
    assert counted["wrong"] == 0 and counted.get("corrected_wrong", 0) == 0, counted
    return counted


def generated(count, seed):
    """Cases that hypothesis makes; `results`: how many calls were no refusals."""
    from generated import run_many

    cases, calls, results = run_many(count, seed)
    return {"cases": cases, "calls": calls, "results": results, "seed": seed}


def passed(text):
    return {"passed": int(re.search(r"(\d+) passed", text)[1])}


def tests(files, *options, **environment):
    """Test files as pytest runs them; how many tests passed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *files]
    return passed(run(*command, **environment))


def large(files):
    """The long half of the tests with more than 2^31 elements, on the best instruction set."""
    import quantkit

    best = [isa for isa in quantkit.backend().isas if isa != "cuda_emu"][-1]
    return tests(files, "-k", best, QUANTKIT_LARGE="1") | {"isa": best}


def sanitized(selections):
    """The kernel tests of an extension built with AddressSanitizer and UBSan, one selection at a time."""
    found = [
        passed(run("make", "sanitize", f"SANITIZE={which}", timeout=7200)) for which in selections
    ]
    return {"passed": sum(each["passed"] for each in found)}
