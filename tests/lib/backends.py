"""What the tests run on: instruction sets, the emulated GPU, a real one; and results that these share."""

import contextlib
import functools
import inspect

import pytest
import torch
from lib.cases import assert_same, invoke, ops

import quantkit
from quantkit import _load
from quantkit.operators import OPERATORS

EMULATOR = "cuda_emu"
BACKENDS = ("reference",) if _load.extension is None else quantkit.backend().isas
if quantkit.backend().cuda_archs and torch.cuda.is_available():
    BACKENDS += ("cuda",)
# Without the emulator, for what concerns no kernel: threads, environments, `out=`.
NATIVE = tuple(name for name in BACKENDS if name != EMULATOR)


@contextlib.contextmanager
def running_on(backend):
    """Operators use this instruction set, or `lib.cases.ops` the GPU, until the end of the block."""
    if _load.extension is None:
        yield
    elif backend == "cuda":
        ops.device = "cuda"
        try:
            yield
        finally:
            ops.device = None
    else:
        before = _load.extension.isa()
        _load.extension.set_isa(backend)
        try:
            yield
        finally:
            _load.extension.set_isa(before)


def daily(parameters, *chosen):
    """Parameters of a test, of which all but the chosen ones belong to the full tier."""
    full = pytest.mark.full
    return [p if p in chosen else pytest.param(p, marks=full) for p in parameters]


# ---- calls that every backend makes -----------------------------------------------------------------

_kept = {}  # the calls of one test


def with_results(calls):
    """(operator, arguments, the reference's result); the generator gets the result where it asks."""
    right = None
    with contextlib.suppress(StopIteration):
        while True:
            name, args = calls.send(right)
            right = invoke(OPERATORS[name].reference, args)
            yield name, args, right


def on_every_backend(generator=None, *, emulated=False):
    """A test of a generator of calls, `yield operator, arguments`: each gives the reference's result.

    Calls and results are made on the first backend and kept for the others, which conftest.py runs
    right after it: the reference takes far longer than the kernels. `emulated` says whether, or by a
    function for which parameters, the emulator runs daily too, and not in the full tier alone. None:
    it never does, as of a million elements, which take it minutes.
    """
    if generator is None:
        return functools.partial(on_every_backend, emulated=emulated)

    @functools.wraps(generator)
    def test(backend, **parameters):
        key = (generator, *parameters.values())
        if key not in _kept:
            _kept.clear()
            _kept[key] = list(with_results(generator(**parameters)))
            assert _kept[key], "no calls"
        for i, (name, args, right) in enumerate(_kept[key]):
            try:
                assert_same(invoke(getattr(ops, name), args), right)
            except AssertionError as error:
                raise AssertionError(f"call {i}, {name}{shown(args)}: {error}") from None

    backend = inspect.Parameter("backend", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(generator)
    test.__signature__ = signature.replace(parameters=[backend, *signature.parameters.values()])
    return pytest.mark.emulated.with_args(emulated)(test)


def shown(args):
    """Arguments, tensors by their shape, strides and dtype."""

    def short(a):
        if not isinstance(a, torch.Tensor):
            return str(a)
        return f"{str(a.dtype)[6:]}{list(a.shape)} by {list(a.stride())}"

    return f"({', '.join(map(short, args))})"
