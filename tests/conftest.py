"""Which code the tests run on: every instruction set of the machine, or the fallback."""

import os

# Threads that spin while they wait take the cores from those they wait for: on a loaded machine the
# generated cases took sixteen times as long. Read when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from lib.cases import ops
from lib.generated import SEED

import quantkit
from quantkit import _load

FALLBACK = os.environ.get("QUANTKIT_REFERENCE") == "1"
ISAS = ("reference",) if _load.extension is None else quantkit.backend().isas
if quantkit.backend().cuda_archs and torch.cuda.is_available():
    ISAS += ("cuda",)


def pytest_configure(config):
    """A suite that compares the reference with itself proves nothing: refuse to."""
    if _load.extension is None and not FALLBACK:
        raise pytest.UsageError("the extension is not built: run `make build`")
    if os.environ.get("QUANTKIT_REQUIRE_EXTENSION") == "1" and not quantkit.backend().extension:
        raise pytest.UsageError(f"QUANTKIT_REQUIRE_EXTENSION=1, but {quantkit.backend()}")


def pytest_report_header():
    return str(quantkit.backend())


def pytest_terminal_summary(terminalreporter):
    """How many tests passed on each instruction set, so that a missing one is seen, and the seed."""
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", [])]
    counts = {isa: sum(f"[{isa}" in name for name in passed) for isa in ISAS}
    if any(counts.values()):
        shown = ", ".join(f"{isa} {count}" for isa, count in counts.items())
        terminalreporter.write_line(f"passed on each instruction set: {shown}")
    terminalreporter.write_line(f"generated cases: QUANTKIT_SEED={SEED}")


def pytest_collection_modifyitems(config, items):
    if FALLBACK and any("fallback" not in item.keywords for item in items):
        chosen = [item for item in items if "fallback" in item.keywords]
        config.hook.pytest_deselected(items=[i for i in items if i not in chosen])
        items[:] = chosen


@pytest.fixture(params=ISAS)
def backend(request):
    """Runs the test once with each instruction set, and on a GPU; its value is the name."""
    if _load.extension is None:
        yield request.param
        return
    if request.param == "cuda":
        ops.device = "cuda"
        yield request.param
        ops.device = None
        return
    before = _load.extension.isa()
    _load.extension.set_isa(request.param)
    assert quantkit.backend().isa == request.param
    yield request.param
    _load.extension.set_isa(before)
