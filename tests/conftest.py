"""Which tests run, and on which code: every instruction set of the machine, or the fallback."""

import os
import random

# Read when torch loads OpenMP, also by processes that tests begin. One thread: tests run side by side,
# and those of threads set their number. Threads that spin take the cores from those they wait for.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Of generated cases, the same in all workers. QUANTKIT_SEED=N repeats a run.
os.environ.setdefault("QUANTKIT_SEED", str(random.SystemRandom().randrange(2**32)))

import pytest
import torch
from lib.backends import BACKENDS, EMULATOR, NATIVE, running_on
from lib.forks import Torch

import quantkit
from quantkit import _load

FALLBACK = os.environ.get("QUANTKIT_REFERENCE") == "1"


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the full tier too")


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
    counts = {name: sum(f"[{name}" in nodeid for nodeid in passed) for name in BACKENDS}
    if any(counts.values()):
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        terminalreporter.write_line(f"passed on each instruction set: {shown}")
    terminalreporter.write_line(f"generated cases: QUANTKIT_SEED={os.environ['QUANTKIT_SEED']}")


def parameters_of(item):
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


def emulated(item):
    """When a test is emulated: True: daily, False: in the full tier, None: never; other tests: True."""
    parameters = parameters_of(item)
    marker = item.get_closest_marker("emulated")
    if marker is None or parameters.pop("backend", None) != EMULATOR:
        return True
    (which,) = marker.args
    return which(**parameters) if callable(which) else which


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leaves the full tier out, unless --full or -m full asks for it."""
    for item in items:
        if emulated(item) is False:
            item.add_marker("full")
    full = config.getoption("full") or "full" in config.option.markexpr
    left_out = [
        item
        for item in items
        if (FALLBACK and "fallback" not in item.keywords)
        or ("full" in item.keywords and not full)
        or emulated(item) is None
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    # The backends of a test one after the other: they share its calls.
    first = {}
    for item in items:
        others = {k: v for k, v in parameters_of(item).items() if k != "backend"}
        group = item.parent.nodeid, getattr(item, "originalname", item.name), str(others)
        item.stash[GROUP] = first.setdefault(group, len(first))
    left_out = set(left_out)
    items[:] = sorted((i for i in items if i not in left_out), key=lambda item: item.stash[GROUP])


GROUP = pytest.StashKey[int]()


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs the test once with each instruction set, and on a GPU; its value is the name."""
    with running_on(request.param):
        yield request.param


@pytest.fixture(params=NATIVE)
def native(request):
    """As backend, without the emulator."""
    with running_on(request.param):
        yield request.param


@pytest.fixture(scope="session")
def torch_process():
    process = Torch()
    yield process
    process.close()


@pytest.fixture(scope="module")
def without_pictures():
    """Reports of checkpoints have none, which take most of the time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("quantkit.checkpoint.reports.picture", lambda _: None)
        yield


@pytest.fixture
def threads():
    """Sets the number of torch's threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def several_threads(threads):
    threads(3)
