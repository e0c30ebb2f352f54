"""Memory that cannot be had: an error that says so, nothing written, nothing lost."""

import contextlib
import ctypes
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lib.cases import assert_same, bits_of

import quantkit
from quantkit import _load

ops = torch.ops.quantkit
TESTS = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
NEVER = 2**45  # elements: more than an address space holds
ERRORS = RuntimeError, MemoryError
SAYS_SO = r"can't allocate memory|bad_alloc|Cannot allocate"
ISAS = (quantkit.backend().isa, *({"cuda_emu"} & set(quantkit.backend().isas)))


@pytest.fixture(params=ISAS)
def isa(request):
    """Instruction sets differ in no allocation: the one in use, and the emulator with its scratch."""
    before = _load.extension.isa()
    _load.extension.set_isa(request.param)
    yield request.param
    _load.extension.set_isa(before)


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def uses(t):
    """How many tensors and other things hold t's memory."""
    return torch._C._storage_Use_Count(t.untyped_storage()._cdata)


def tuple_of(result):
    return result if isinstance(result, tuple) else (result,)


def tensors_of(args):
    return [a for a in args if isinstance(a, torch.Tensor)]


# ---- tensors without end --------------------------------------------------------------------------

X, Q, INTEGER = torch.full((1,), 0.7), torch.full((1,), 3, dtype=torch.int8), torch.full((1,), 2)
P = torch.full((1,), 0.1), torch.full((1,), 2.0)
CHOSEN = (None, -128, 127, 1e-8, False)
WITHOUT_END = {
    "quantize": (X, *P, -128, 127, torch.int8),
    "quantize, x converted": (INTEGER, *P, -128, 127, torch.int16),
    "dequantize": (Q, *P),
    "dequantize, q converted": (INTEGER, *P),
    "fake_quantize": (X, *P, -128, 127),
    "fake_quantize, zero_point converted": (X, P[0], INTEGER, -128, 127),
    "_fake_quantize_backward": (X, X, *P, -128, 127),
    "choose_qparams, x converted": (INTEGER, *CHOSEN),
    "choose_qparams, as many parameters": (X, [1], *CHOSEN[1:]),
    "dynamic_quantize": (X, *CHOSEN, torch.int8),
    "dynamic_quantize, x converted": (INTEGER, *CHOSEN, torch.int8),
    "quantize_dequantize": (X, *CHOSEN, torch.int8),
}


@pytest.mark.parametrize("which", WITHOUT_END)
def test_results_that_no_memory_can_hold(which, isa):
    name, args = which.split(",")[0], WITHOUT_END[which]
    whole = [a.expand(NEVER) if isinstance(a, torch.Tensor) else a for a in args]
    ones = tensors_of(args)
    bits, held = [bits_of(t) for t in ones], [uses(t) for t in ones]
    for i in range(110):
        if i == 10:
            before = resident()
        with pytest.raises(ERRORS, match=SAYS_SO):
            getattr(ops, name)(*whole)
    assert resident() - before < 1 << 20
    assert [uses(t) for t in ones] == held
    assert all(map(torch.equal, map(bits_of, ones), bits))
    assert_same(getattr(ops, name)(*args), _load._OPERATORS[name][2](*args))


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


# ---- an address space with a limit ----------------------------------------------------------------


def given(name, n, converts):
    """Arguments of n * n elements; converts: of dtypes that no kernel takes."""
    x = torch.linspace(-3, 3, n * n).view(n, n)
    scale, zero_point = torch.full((n, 1), 0.02), torch.full((n, 1), 3.0)
    q = (x * 40).to(torch.int16)
    grad = x.flip(0)
    if converts:
        zero_point, q = (x * 9).to(torch.int32), q.to(torch.int32)
        x = x if name == "_fake_quantize_backward" else (x * 40).to(torch.int16)
    chosen = (x, [1, 1] if converts else [1, -1], *CHOSEN[1:])
    return {
        "quantize": (x, scale, zero_point, -128, 127, torch.int16),
        "dequantize": (q, scale, zero_point),
        "fake_quantize": (x, scale, zero_point, -128, 127),
        "_fake_quantize": (x, scale, zero_point, -128, 127),
        "_fake_quantize_backward": (grad, x, scale, zero_point, -128, 127),
        "choose_qparams": (x, [1, 1], *CHOSEN[1:]),
        "dynamic_quantize": (*chosen, torch.int16),
        "quantize_dequantize": (*chosen, torch.int16),
    }[name]


def strided(t):
    return torch.empty((*t.shape[:-1], t.shape[-1] * 2), dtype=t.dtype)[..., ::2]


def limited_calls(isa):
    """(what is tried, operator, arguments, outputs or None)."""
    emulated = isa == "cuda_emu"
    n = 1 << (10 if emulated else 11)
    for name, (_, names, function, _) in _load._OPERATORS.items():
        if emulated and "zero_point" not in names:
            continue  # slow, and with no scratch of its own
        args = given(name, n, True)
        outs = dict(zip(names, map(strided, tuple_of(function(*args))), strict=True))
        yield f"{name}, into strided outputs", name, args, outs
        if not emulated:
            yield f"{name}, converted", name, args, None
            yield f"{name}, plain", name, given(name, n, False), None
    if emulated:
        return
    # 65536 parameters that 16 threads reduce each for itself.
    x = torch.linspace(-3, 3, 256).view(256, 1) * torch.linspace(1, 2, 65536)
    outs = {k: torch.empty(1, 65536) for k in ("scale", "zero_point")}
    yield "keys of each thread", "choose_qparams", (x, [-1, 1], *CHOSEN[1:]), outs
    # Only a table of all addresses shows that these elements do not overlap: of 6 MiB.
    x = torch.linspace(-3, 3, 2).expand(3 << 23, 2)
    out = torch.empty((6 << 23) + 8, dtype=torch.int8).as_strided(x.shape, (2, 3))
    args = (x, torch.tensor(0.1), torch.tensor(2.0), -128, 127, torch.int8)
    yield "interleaved output", "quantize", args, {"out": out}


@contextlib.contextmanager
def room(size):
    """Lets the address space grow by `size` and no more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def refused_step_by_step(isa):
    """Limits the address space of this process, so that each allocation of a call is refused once.

    From too little for the first one, in steps, until the call works. Prints how often it did not.
    """
    _load.extension.set_isa(isa)
    torch.set_num_threads(16)
    for which, name, args, outs in limited_calls(isa):
        try:
            print(f"{which}: {refusals(name, args, outs, 1 << (20 if isa == 'cuda_emu' else 22))}")
        except AssertionError as error:
            raise AssertionError(f"{which}: {error}") from None


def refusals(name, args, outs, step):
    right = tuple_of(_load._OPERATORS[name][2](*args))
    inputs = tensors_of(args)
    bits, held = [bits_of(t) for t in inputs], [uses(t) for t in inputs]

    def call():
        if outs is None:
            return tuple_of(getattr(ops, name)(*args))
        getattr(ops, name).out(*args, **outs)
        return tuple(outs.values())

    def works():
        for ours, theirs in zip(call(), right, strict=True):
            assert_same(
                *((ours, theirs) if outs is None else (ours.contiguous(), theirs.contiguous()))
            )

    def error_within(size):
        """What the call says, where it does not work."""
        try:
            with room(size):
                call()
        except ERRORS as error:
            return str(error)

    works()  # begins the threads
    holes = []  # in the heap: filled
    with contextlib.suppress(RuntimeError), room(0):
        while True:
            holes.append(torch.empty(step, dtype=torch.int8))
    for out in (outs or {}).values():
        out.fill_(7)
    refused = 0
    while (error := error_within((refused + 1) * step)) is not None:
        refused += 1
        # Python's own MemoryError, where it finds no room for the exception, says nothing.
        assert not error or re.search(SAYS_SO, error), error
        for k, out in (outs or {}).items():
            assert (out == 7).all(), f"{k} was written with room for {refused} steps"
        assert all(map(torch.equal, map(bits_of, inputs), bits)), "an input changed"
    works()
    for i in range(110 if outs else 0):
        if i == 10:
            before = resident()
        assert error_within(step // 2) is not None
    assert not outs or resident() - before < 1 << 20, f"{resident() - before} bytes lost"
    assert [uses(t) for t in inputs] == held, "an input is held"
    works()
    return refused


def in_another_process(call, **variables):
    """What a function of this file prints in a process of its own: names and numbers."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    program = f"import test_allocation; test_allocation.{call}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": path} | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: int(n) for name, n in re.findall(r"(.*): (\d+)", done.stdout)}


def test_every_allocation_refused_in_turn(isa):
    # Each allocation is a mapping of its own, so that none finds room left by another.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    refused = in_another_process(f"refused_step_by_step({isa!r})", **malloc)
    assert len(refused) >= 3 and all(n > 0 for n in refused.values()), refused


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


def refused_one_by_one(library):
    """Every call of operator new fails once, in each operator; prints how many there were."""
    new, written = ctypes.PyDLL(library), []
    torch.set_num_threads(1)
    for name, (_, names, function, _) in _load._OPERATORS.items():
        args = given(name, 6, True)
        right = tuple_of(function(*args))
        outs = dict(zip(names, map(strided, right), strict=True))
        operator = getattr(ops, name).out
        operator(*args, **outs)
        k, left = 0, -1
        while left < 0:
            for out in outs.values():
                out.fill_(7)
            failed = False
            new.arm(k)
            try:
                operator(*args, **outs)
            except ERRORS:
                failed = True
            left = new.disarm()
            for result, theirs in zip(names, right, strict=True):
                expected = torch.full_like(theirs, 7) if failed else theirs
                if not torch.equal(outs[result], expected):
                    written.append(f"{result} of {name} when new number {k} failed")
            k += 1
        print(f"{name}: {k - 1}")
    assert not written, "\n".join(["written:", *written])


def test_every_small_allocation_refused(tmp_path):
    """Of the operators' own vectors and strings, none is made once an output is written."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    source, library = tmp_path / "new.cpp", tmp_path / "new.so"
    source.write_text(FAILING_NEW)
    command = [*compiler.split(), "-O1", "-shared", "-fPIC", "-o", library, source]
    subprocess.run(command, check=True)
    made = in_another_process(f"refused_one_by_one({str(library)!r})", LD_PRELOAD=str(library))
    assert len(made) == len(_load._OPERATORS) and all(n > 10 for n in made.values()), made
