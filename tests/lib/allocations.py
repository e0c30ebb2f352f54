"""Memory that cannot be had: programs that refuse allocations of every operator, one after the other."""

import contextlib
import ctypes
import re
import resource
from functools import partial
from pathlib import Path

import torch
from lib.cases import (
    arguments,
    assert_same,
    bits_of,
    flat,
    invoke,
    of_linear,
    takes_format,
    tensors_of,
)

from quantkit import _load
from quantkit.operators import OPERATORS, overloads

NEVER = 2**45  # elements: more than an address space holds
ERRORS = RuntimeError, MemoryError
SAYS_SO = r"can't allocate memory|bad_alloc|Cannot allocate"
CHOSEN = (None, -128, 127, 1e-8, False)


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def uses(t):
    """How many tensors and other things hold t's memory."""
    return torch._C._storage_Use_Count(t.untyped_storage()._cdata)


def given(name, n, converts):
    """Arguments of n * n elements; converts: of dtypes that no kernel takes, and as many parameters."""
    x = torch.linspace(-3, 3, n * n).view(n, n)
    blocks = [1, 1] if converts or name.startswith(("choose", "aminmax")) else [1, -1]
    others = {"over": [1, 8]}  # of many blocks, so that there is something to allocate
    if name == "linear_w8a8":  # of half precision, strided weights and a bias
        q = of_linear(x, 1)["q"].t().contiguous().t()
        others = {"x": x.to(torch.bfloat16), "q": q, "bias": torch.ones(len(q)).half()}
    else:
        others |= {"zero_point": torch.full((n, n), 3, dtype=torch.int32)}
        if name != "_fake_quantize_backward":  # where x has grad's dtype
            others["x"] = (x * 40).to(torch.int16)
        if not takes_format(name):  # where q has the format's dtype
            others["q"] = (x * 40).to(torch.int32)
    others = others if converts else {"over": [1, 8]}
    return arguments(name, x, blocks, int(converts), **others)  # turn 1: of a zero point


def strided(t):
    if t.dim() == 0:
        return torch.empty_like(t)
    return torch.empty((*t.shape[:-1], t.shape[-1] * 2), dtype=t.dtype)[..., ::2]


def limited_calls(isa):
    """(what is tried, operator, arguments, outputs or None)."""
    emulated = isa == "cuda_emu"
    n = 1 << 10
    for name, (_, names, function, *_) in OPERATORS.items():
        if emulated and "zero_point" not in names:
            continue  # slow, and with no scratch of its own
        args = given(name, n, True)
        outs = dict(zip(names, map(strided, flat(invoke(function, args))), strict=True))
        if name != "_masked_gradient":  # which needs no memory beside them
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
            print(f"{which}: {count_refused(name, args, outs, 1 << 19)}")
        except AssertionError as error:
            raise AssertionError(f"{which}: {error}") from None


def count_refused(name, args, outs, step):
    right = flat(invoke(OPERATORS[name].reference, args))
    inputs = tensors_of(args)
    bits, held = [bits_of(t) for t in inputs], [uses(t) for t in inputs]

    def call():
        if outs is None:
            return flat(invoke(overloads(name)[0], args))
        invoke(partial(overloads(name)[1], **outs), args)
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
    holes = []  # in the heap: filled, the large ones first
    for hole in (step, step // 2, step // 4, step // 8):
        with contextlib.suppress(RuntimeError), room(0):
            while True:
                holes.append(torch.empty(hole, dtype=torch.int8))
    for out in (outs or {}).values():
        out.fill_(7)
    refused = 0
    while (error := error_within((refused + 1) * step)) is not None:
        refused += 1
        # Python's own MemoryError, where it finds no room for the exception, says nothing.
        assert not error or re.search(SAYS_SO, error), error
        for k, out in (outs or {}).items():
            assert (out == out.new_full((), 7)).all(), (
                f"{k} was written with room for {refused} steps"
            )
        assert all(map(torch.equal, map(bits_of, inputs), bits)), "an input changed"
    works()
    for i in range(110 if outs else 0):
        if i == 10:
            before = resident()
        assert error_within(step // 2) is not None, f"call {i} worked with half a step"
    assert not outs or resident() - before < 1 << 20, f"{resident() - before} bytes lost"
    assert [uses(t) for t in inputs] == held, "an input is held"
    works()
    return refused


def refused_one_by_one(library):
    """Every call of operator new fails once, in each operator; prints how many there were."""
    new, written = ctypes.PyDLL(library), []
    torch.set_num_threads(1)
    for name, (_, names, function, *_) in OPERATORS.items():
        args = given(name, 6, True)
        right = flat(invoke(function, args))
        outs = dict(zip(names, map(strided, right), strict=True))
        operator = overloads(name)[1]
        invoke(partial(operator, **outs), args)
        k, left = 0, -1
        while left < 0:
            for out in outs.values():
                out.fill_(7)
            failed = False
            new.arm(k)
            try:
                invoke(partial(operator, **outs), args)
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
