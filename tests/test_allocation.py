"""Memory that cannot be had: an error that says so, nothing written, nothing lost."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lib.allocations import CHOSEN, ERRORS, NEVER, SAYS_SO, resident, tensors_of, uses
from lib.backends import EMULATOR, daily, running_on
from lib.cases import assert_same, bits_of

import quantkit
from quantkit.operators import OPERATORS

ops = torch.ops.quantkit
TESTS = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
# Instruction sets differ in no allocation: the one in use, and the emulator with its scratch.
IN_USE = quantkit.backend().isa
ISAS = (IN_USE, *({EMULATOR} & set(quantkit.backend().isas)))


@pytest.fixture(params=daily(ISAS, IN_USE))
def isa(request):
    with running_on(request.param):
        yield request.param


# ---- tensors without end --------------------------------------------------------------------------

X, Q, INTEGER = torch.full((1,), 0.7), torch.full((1,), 3, dtype=torch.int8), torch.full((1,), 2)
P = torch.full((1,), 0.1), torch.full((1,), 2.0)
WITHOUT_END = {
    "quantize": (X, *P, -128, 127, torch.int8),
    "quantize, x converted": (INTEGER, *P, -128, 127, torch.int16),
    "dequantize": (Q, *P),
    "dequantize, q converted": (INTEGER, *P),
    "fake_quantize": (X, *P, -128, 127),
    "fake_quantize, zero_point converted": (X, P[0], INTEGER, -128, 127),
    "_fake_quantize_masked": (X, *P, -128, 127),
    "_masked_gradient": (X, X > 0),
    "_fake_quantize_backward": (X, X, *P, -128, 127),
    "choose_qparams, x converted": (INTEGER, *CHOSEN),
    "choose_qparams, as many parameters": (X, [1], *CHOSEN[1:]),
    "dynamic_quantize": (X, *CHOSEN, torch.int8),
    "dynamic_quantize, x converted": (INTEGER, *CHOSEN, torch.int8),
    "quantize_dequantize": (X, *CHOSEN, torch.int8),
}


@pytest.mark.parametrize("which", daily(WITHOUT_END, "quantize", "choose_qparams, x converted"))
def test_results_that_no_memory_can_hold(which, isa):
    name, args = which.split(",")[0], WITHOUT_END[which]
    whole = [a.expand(NEVER) if isinstance(a, torch.Tensor) else a for a in args]
    ones = tensors_of(args)
    bits, held = [bits_of(t) for t in ones], [uses(t) for t in ones]
    for i in range(40):
        if i == 10:
            before = resident()
        with pytest.raises(ERRORS, match=SAYS_SO):
            getattr(ops, name)(*whole)
    assert resident() - before < 1 << 18
    assert [uses(t) for t in ones] == held
    assert all(map(torch.equal, map(bits_of, ones), bits))
    assert_same(getattr(ops, name)(*args), OPERATORS[name].reference(*args))


@pytest.mark.parametrize("shape", [(2**61,), (2**31, 2**31), (2**62,)], ids=str)
def test_more_bytes_than_can_be_counted(shape, isa):
    with pytest.raises(ERRORS):
        ops.dequantize(Q.expand(shape), torch.tensor(0.1), torch.tensor(2.0))
    with pytest.raises(ERRORS):
        ops.choose_qparams(X.expand(shape), [1] * len(shape), *CHOSEN[1:])


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_parameters_stay_where_x_cannot_be_converted(shape, isa):
    """choose_qparams.out has small outputs however large x is."""
    outs = {k: torch.full(shape, 5.0) for k in ("scale", "zero_point")}
    blocks = [-1] if shape else None
    with pytest.raises(ERRORS, match=SAYS_SO):
        ops.choose_qparams.out(INTEGER.expand(NEVER), blocks, *CHOSEN[1:], **outs)
    assert all((t == 5).all() for t in outs.values())


def in_another_process(call, **variables):
    """What a function of lib.allocations prints in a process of its own: names and numbers."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    program = f"from lib import allocations; allocations.{call}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": path} | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: int(n) for name, n in re.findall(r"(.*): (\d+)", done.stdout)}


@pytest.mark.full
def test_every_allocation_refused_in_turn(isa):
    # Each allocation is a mapping of its own, so that none finds room left by another. Neither Python's
    # arenas nor the end of the heap are given back while the room is measured.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    kept = {"PYTHONMALLOC": "malloc", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    refused = in_another_process(f"refused_step_by_step({isa!r})", **malloc, **kept)
    assert len(refused) >= 3 and all(n > 0 for n in refused.values()), refused


def test_strings_leave_nothing_behind():
    """torch 2.13's own conversion of a `str` argument to C++ leaks 48 bytes in every call."""

    def calls(count):
        for _ in range(count):
            ops.choose_qparams.format(X, *CHOSEN[:4], True, "int8", scale_rule="half_range")

    def growth():
        before = resident()
        calls(20_000)
        return resident() - before

    calls(2_000)
    # 1.9 MB with the leak, each time; others of the process may grow once.
    assert min(growth() for _ in range(3)) < 1 << 18


# ---- the smallest allocations ---------------------------------------------------------------------

# In place of every library's operator new: after arm(k) this thread's call number k fails.
FAILING_NEW = """
#include <cstdlib>
#include <new>

static thread_local long left = -1;
extern "C" void arm(long k) { left = k; }
extern "C" long disarm() {
  const long k = left;
  left = -1;
  return k;
}
void* operator new(std::size_t n) {
  void* const p = left >= 0 && left-- == 0 ? nullptr : std::malloc(n > 0 ? n : 1);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
"""


def test_every_small_allocation_refused(tmp_path):
    """Of the operators' own vectors and strings, none is made once an output is written."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    source, library = tmp_path / "new.cpp", tmp_path / "new.so"
    source.write_text(FAILING_NEW)
    command = [*compiler.split(), "-O1", "-shared", "-fPIC", "-o", library, source]
    subprocess.run(command, check=True)
    made = in_another_process(f"refused_one_by_one({str(library)!r})", LD_PRELOAD=str(library))
    assert len(made) == len(OPERATORS) and all(n > 10 for n in made.values()), made
