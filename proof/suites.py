"""What the tests prove: generated cases, test files of the long form, test files under sanitizers."""

import re
import sys

from machines import ROOT, run

sys.path.insert(0, str(ROOT / "tests"))


def generated(count, seed):
    """Cases that hypothesis makes; `results`: how many calls were no refusals."""
    from lib.generated import run_many

    cases, calls, results = run_many(count, seed)
    return {"cases": cases, "calls": calls, "results": results}


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


def sanitized(selection):
    """The kernels' tests on an extension built with AddressSanitizer and UBSan."""
    return passed(run("make", "sanitize", f"SANITIZE={selection}", timeout=7200))
