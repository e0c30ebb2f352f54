"""What the tests prove: generated cases, large tensors, tests under sanitizers."""

import re
import sys

from machines import ROOT, run

sys.path.insert(0, str(ROOT / "tests"))


def generated(count, seed):
    """Cases that hypothesis makes; `results`: how many calls gave no error."""
    from lib.generated import run_many

    cases, calls, results = run_many(count, seed)
    return {"cases": cases, "calls": calls, "results": results}


def passed(text):
    return {"passed": int(re.search(r"(\d+) passed", text)[1])}


def large():
    """The long half of the tests with more than 2^31 elements, on the best instruction set."""
    import quantkit

    best = [isa for isa in quantkit.backend().isas if isa != "cuda_emu"][-1]
    command = ("-m", "pytest", "-p", "no:cacheprovider", "--full")
    command += ("tests/test_large.py", "-k", best)
    return passed(run(sys.executable, *command, QUANTKIT_LARGE="1")) | {"isa": best}


def sanitized(selection):
    """Daily tests on an extension built with AddressSanitizer and UBSan."""
    return passed(run("make", "sanitize", f"SANITIZE={selection}", "TIER=", timeout=7200))
