"""The caller's floating-point environment: it changes no bit of a result, and stays as it was."""

import contextlib
import ctypes
import ctypes.util
import functools
import itertools
import os
import platform
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lib.cases import FLOATS, STRIDES, assert_same, ops, parameter_shape, values

import quantkit
from quantkit import _load, reference

TESTS = Path(__file__).resolve().parent
MACHINE = platform.machine()
pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.skipif(
        not sys.platform.startswith("linux") or MACHINE not in ("x86_64", "aarch64"),
        reason="fenv_t is known for Linux on x86-64 and aarch64 only",
    ),
]

# ---- the environment ------------------------------------------------------------------------------

ROUNDINGS = ("nearest", "down", "up", "zero")


@dataclass(frozen=True)
class Mode:
    """What a thread may have set: a rounding, flushing of results and of operands, raised flags."""

    rounding: str = "nearest"
    ftz: bool = False
    daz: bool = False
    flags: bool = False

    def words(self, env):
        """The fields of fenv_t that hold it: (offset, format, value)."""
        if MACHINE == "aarch64":  # FPCR, FPSR
            flush = (1 << 24 | 1 << 19) * (self.ftz or self.daz)
            rounding = {"nearest": 0, "up": 1, "down": 2, "zero": 3}[self.rounding] << 22
            return (0, "I", rounding | flush), (4, "I", 0x1F * self.flags)
        rounding = ROUNDINGS.index(self.rounding)
        x87 = struct.unpack_from("H", env)[0] & ~0xC00 | rounding << 10
        mxcsr = 0x1F80 | rounding << 13 | self.ftz << 15 | self.daz << 6 | 0x3F * self.flags
        return (0, "H", x87), (28, "I", mxcsr)


DEFAULT = Mode()
HARSH = Mode("up", ftz=True, daz=True, flags=True)
EVERY_MODE = [Mode(*m) for m in itertools.product(ROUNDINGS, *[(False, True)] * 3)]
# Each setting alone, and together.
MODES = [Mode(r) for r in ROUNDINGS] + [Mode(ftz=True), Mode(daz=True), Mode(flags=True), HARSH]


@functools.cache
def libm():
    return ctypes.CDLL(ctypes.util.find_library("m"))


def read_environment():
    env = ctypes.create_string_buffer(64)
    assert libm().fegetenv(env) == 0
    return env


def state():
    """This thread's control bits and flags."""
    env = read_environment()
    if MACHINE == "aarch64":
        return struct.unpack_from("I", env, 0)[0], struct.unpack_from("I", env, 4)[0] & 0x1F
    x87, mxcsr = struct.unpack_from("H", env)[0], struct.unpack_from("I", env, 28)[0]
    return (x87, mxcsr & ~0x3F), mxcsr & 0x3F


def enter(mode):
    """Puts this thread into a mode."""
    env = read_environment()
    for offset, kind, value in mode.words(env):
        struct.pack_into(kind, env, offset, value)
    assert libm().fesetenv(env) == 0


@contextlib.contextmanager
def environment(mode):
    before = read_environment()
    enter(mode)
    try:
        yield
    finally:
        assert libm().fesetenv(before) == 0


def check(mode, cases):
    """The cases' results in a mode, compared in the default one; each call leaves the mode as it was."""
    with environment(mode):
        before = state()
        made = [(case(), state()) for case in cases]
    for case, (result, after) in zip(cases, made, strict=True):
        try:
            case.compare(result)
            assert after[0] == before[0], f"control bits {after[0]}, not {before[0]}"
            assert after[1] & before[1] == before[1], f"flags {after[1]:x}, not {before[1]:x}"
        except AssertionError as error:
            raise AssertionError(f"{case.name} in {mode}: {error}") from None


# ---- inputs where it matters ----------------------------------------------------------------------


class Case:
    """A call of an operator and, made in the default environment, its right result."""

    def __init__(self, name, args, right=None, out=False):
        self.name, self.args = name, args
        _, names, function, _ = _load._OPERATORS[name]
        self.right = (function(*args) if right is None else right,)
        if isinstance(self.right[0], tuple):
            (self.right,) = self.right
        self.outs = None
        if out:
            outs = (STRIDES["strided" if t.dim() else "contiguous"](t) for t in self.right)
            self.outs = {n: t.clone() for n, t in zip(names, outs, strict=True)}

    def __call__(self):
        if self.outs is None:
            made = getattr(ops, self.name)(*self.args)
            return made if isinstance(made, tuple) else (made,)
        for out in self.outs.values():
            out.zero_()
        getattr(ops, self.name).out(*self.args, **self.outs)
        return tuple(self.outs.values())

    def compare(self, result):
        if self.outs is None:
            return assert_same(result, self.right)
        for ours, right in zip(result, self.right, strict=True):
            assert_same(ours.contiguous(), right.contiguous())


def to(t, dtype):
    """t, of float64, in dtype, as the contract converts."""
    return t.to(torch.float32).to(dtype) if dtype in FLOATS[2:] else t.to(dtype)


def inputs(shape, dtype, kind, blocks, seed):
    """x, scale and zero_point: ties; much between them; denormals, and what a denormal decides."""
    tiny = torch.finfo(dtype).smallest_normal
    x = values(shape, torch.float64, seed)
    size = parameter_shape(shape, blocks)
    spread = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale, zero_point = {
        "ties": (torch.full(size, 0.5), 3.0),
        "between": (spread * 0.02 + 0.01, 0.3),
        "denormal": (spread * tiny / 100 + tiny / 300, tiny / 3),
        "beside a tie": (spread + 0.5, 0.5),
    }[kind]
    if kind in ("denormal", "beside a tie"):
        x = x * tiny / 4
    zero_point = torch.full(size, zero_point, dtype=torch.float64)
    return to(x, dtype), to(scale, dtype), to(zero_point, dtype)


KINDS = ("ties", "between", "denormal", "beside a tie")
BLOCKS = (None, [1, -1], [-1, 1], [1, 1])


@functools.cache
def made(dtype, shape, layout):
    """(operator, arguments, right result) of every operator."""
    results = []
    for i, (kind, blocks) in enumerate(itertools.product(KINDS, BLOCKS)):
        x, scale, zero_point = inputs(shape, dtype, kind, blocks, i)
        x = STRIDES[layout](x)
        given = (x, scale, zero_point, -128, 127)
        q = STRIDES[layout](torch.arange(x.numel()).view(shape).to(torch.int8))
        eps = 1e-8 if i % 2 else max(torch.finfo(dtype).smallest_normal / 1000, 1e-307)
        for name, args in (
            ("quantize", (*given, torch.int8)),
            ("dequantize", (q, scale, zero_point)),
            ("fake_quantize", given),
            ("_fake_quantize_backward", (x.flip(0), *given)),
            ("choose_qparams", (x, blocks, -128, 127, eps, i % 2 == 0)),
            ("dynamic_quantize", (x, blocks, 0, 255, eps, False, torch.uint8, i % 3 == 0)),
            ("quantize_dequantize", (x, blocks, -127, 127, eps, i % 2 == 0, torch.int8)),
        ):
            results.append((name, args, Case(name, args).right))
    return results


def cases_of(dtype, shape, layout="contiguous", out=False):
    return [Case(*each, out=out) for each in made(dtype, shape, layout)]


# ---- the tests ------------------------------------------------------------------------------------


def test_the_modes_are_what_they_say():
    """Else the tests below prove nothing."""
    one, tiny, half = torch.tensor(1.0), torch.full((8,), 1e-39), torch.tensor(0.5)
    ulp = torch.tensor(2.0**-30)
    for mode in EVERY_MODE:
        with environment(mode):
            above, below = one + ulp, one - ulp
            vanished = tiny * half == 0
            flags = state()[1]
        assert (above > 1).item() == (mode.rounding == "up")
        assert (below < 1).item() == (mode.rounding in ("down", "zero"))
        assert vanished.all() if mode.ftz or mode.daz else not vanished.any()
        assert flags == (0x1F if MACHINE == "aarch64" else 0x3F) or not mode.flags
    assert state()[0] == state_of(DEFAULT)[0]


def state_of(mode):
    with environment(mode):
        return state()


@pytest.mark.parametrize("out", [False, True], ids=["plain", "out"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 700)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_operator_in_every_mode(dtype, shape, out, backend):
    modes = MODES if shape == (3, 700) and (out or backend == "cuda_emu") else EVERY_MODE
    cases = cases_of(dtype, shape, out=out)
    for mode in modes:
        check(mode, cases)


@pytest.mark.parametrize("layout", ["misaligned", "transposed", "strided", "every other row"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_tensors(dtype, layout):
    cases = cases_of(dtype, (6, 350), layout)
    for mode in (DEFAULT, Mode("up"), HARSH):
        check(mode, cases)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_several_threads(dtype, backend):
    """More than 2 * 16384 elements, which the kernels of the CPU share."""
    every = 16 if backend == "cuda_emu" else 1  # slow, and on one thread anyway
    cases = cases_of(dtype, (9, 5003))[::every]
    for mode in (Mode("up"), Mode("zero", daz=True), HARSH):
        check(mode, cases)
    check(HARSH, cases_of(dtype, (9, 5003), "transposed", out=True)[::every])


def converted():
    """Arguments that become another dtype first."""
    large = torch.arange(1, 4001, 2).view(20, 100) + 2**24
    scale, zero_point = torch.tensor(2.0**10), torch.tensor(-(2**14) + 1)
    wide = torch.tensor([0.1, 2049.0, 65519.9], dtype=torch.float64).view(3, 1)
    x = values((3, 700), torch.float16)
    return [
        Case("quantize", (large, scale, zero_point, -128, 127, torch.int8)),
        Case("fake_quantize", (large, torch.tensor(1.0), -(large[:1] + 2), -128, 127)),
        Case("dequantize", (large, torch.tensor(0.1), large[:1] + 1)),
        Case("dequantize", (large.double() / 3, torch.tensor(0.1), torch.tensor(0.3))),
        Case("choose_qparams", (large, [1, -1], -128, 127, 1e-8, False)),
        Case("quantize_dequantize", (large, None, -32768, 32767, 1e-8, True, torch.int16)),
        Case("quantize", (x, wide, wide, -128, 127, torch.int8)),
        Case("quantize", (x, torch.tensor(0.1), wide[1, 0], -128, 127, torch.int8)),
        Case("quantize", (x, wide.half(), wide.to(torch.int64), -30000, 30000, torch.int16)),
        Case("fake_quantize", (x.bfloat16(), wide[0, 0], wide, 0, 255)),
    ]


def test_arguments_that_are_converted_first():
    cases = (
        converted() * 2
    )  # the emulator passes parameters in memory and among the arguments by turns
    for mode in EVERY_MODE:
        check(mode, cases)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_in_place(dtype):
    x, *rest = inputs((3, 700), dtype, "between", [1, -1], 1)
    right = reference.fake_quantize_op(x, *rest, -128, 127)
    for mode in MODES:
        y = x.clone()
        with environment(mode):
            ops.fake_quantize.out(y, *rest, -128, 127, out=y)
        assert_same(y, right)


def test_outputs_that_are_streamed(backend):
    if backend == "cuda_emu":
        pytest.skip("only the CPU's kernels stream")
    x = values((1 << 23,), torch.float32) * 1e-38
    args = (x, torch.tensor(1e-39), torch.tensor(0.0), -128, 127)
    y, right = torch.empty_like(x), reference.fake_quantize_op(*args)
    with environment(HARSH):
        ops.fake_quantize.out(*args, out=y)
    assert_same(y, right)


def test_a_number_that_is_denormal_is_above_0_for_eps():
    x = torch.zeros(3, 700, dtype=torch.float64)
    args = (x, None, -128, 127, 5e-324, True)
    case = Case("choose_qparams", args)
    assert case.right[0] == 5e-324
    check(DEFAULT, [case])
    check(Mode(daz=True), [case])


def test_a_caller_that_flushes_denormals():
    """As torch has it: torch.set_flush_denormal()."""
    tiny = torch.full((8,), 1e-39)
    cases = cases_of(torch.float32, (3, 700))
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        assert (tiny * 0.5 == 0).all()
        results = [case() for case in cases]
        assert (tiny * 0.5 == 0).all(), "the caller's setting is lost"
    finally:
        torch.set_flush_denormal(False)
    for case, result in zip(cases, results, strict=True):
        case.compare(result)


def test_a_call_that_raises():
    x, scale, zero = torch.randn(40, 1000), torch.tensor(0.1), torch.tensor(0.0)
    never = torch.empty(1).expand(2**46)
    refused = {
        "does not fit": lambda: ops.quantize(x, scale.expand(7), zero, -128, 127, torch.int8),
        "eps": lambda: ops.choose_qparams(x, None, -128, 127, -1.0, True),
        "overlap": lambda: ops.fake_quantize.out(x, x[:, :1], zero, -128, 127, out=x),
        "memory": lambda: ops.dequantize(never, scale, zero),
    }
    for mode, (text, call) in itertools.product(MODES, refused.items()):
        with environment(mode):
            before = state()
            with pytest.raises((RuntimeError, ValueError), match=text):
                call()
            after = state()
        assert after[0] == before[0]
        assert after[1] & before[1] == before[1]


@pytest.mark.skipif(MACHINE != "x86_64", reason="only the control bits are restored")
def test_kernels_raise_no_flag():
    """Divisions by 0, overflow, underflow, NaN: none of it is seen by the caller."""
    x = torch.tensor([1e30, 1e-40, 3.0, float("nan"), float("inf")]).repeat(20, 2000)
    y = torch.empty_like(x)
    q = torch.empty(x.shape, dtype=torch.int8)
    args = [(x, torch.tensor(s), torch.tensor(0.3), -128, 127) for s in (0.0, 1e-30, 1e30)]
    with environment(DEFAULT):
        for each in args:
            ops.fake_quantize.out(*each, out=y)
            ops.quantize.out(*each, torch.int8, out=q)
        assert state()[1] == 0
        assert x.div(0.1).isnan().any() and state()[1] != 0


# ---- other threads, other processes ---------------------------------------------------------------


def in_threads(work, count):
    """work(i) in each of `count` new threads at the same time; what was raised there is raised here."""
    start, failures = threading.Barrier(count), []

    def guarded(i):
        try:
            start.wait(60)
            work(i)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


def test_threads_that_differ():
    """Each thread in a mode of its own, all at the same time, their calls on several threads each."""
    modes = [*MODES, DEFAULT]
    every = [cases_of(torch.float32, (9, 5003))[::5] for _ in modes]
    results = [[] for _ in modes]

    def work(i):
        enter(modes[i])
        before = state()
        for case in every[i]:
            results[i].append((case(), state()))
        results[i].append(before)

    in_threads(work, len(modes))
    assert state()[0] == state_of(DEFAULT)[0]
    for cases, (*made, before) in zip(every, results, strict=True):
        for case, (result, after) in zip(cases, made, strict=True):
            case.compare(result)
            assert after[0] == before[0]


def test_worker_threads_that_were_begun_in_another_mode():
    """OpenMP's threads keep the environment of the thread that began them: here not the caller's."""
    tiny, half = torch.full((1 << 18,), 1e-39), torch.tensor(0.5)
    cases = cases_of(torch.float32, (9, 5003))[::3]
    seen, results = [], []

    def work(_):
        torch.set_num_threads(4)
        with environment(HARSH):
            tiny.mul(half)  # begins them
        seen.append(tiny.mul(half))
        results.extend(case() for case in cases)
        seen.append(tiny.mul(half))

    in_threads(work, 1)
    for case, result in zip(cases, results, strict=True):
        case.compare(result)
    before, after = ((each == 0).sum().item() for each in seen)
    assert 0 < before < tiny.numel(), "the worker threads are in the caller's mode"
    assert after == before, "the worker threads have lost theirs"


IN_ANOTHER_PROCESS = """
import os, signal, sys, torch
from test_environment import *
quantkit._load.extension.set_isa(sys.argv[1])
cases = cases_of(torch.float32, (9, 5003))
enter(HARSH)
if sys.argv[2] == "threads":
    torch.full((1 << 18,), 1e-39).mul(0.5)
before = state()
pid = os.fork()
if pid == 0:
    signal.alarm(60)
results = [case() for case in cases]
after = state()
enter(DEFAULT)
torch.set_num_threads(1)  # for torch's own comparison in a child
for case, result in zip(cases, results, strict=True):
    case.compare(result)
assert after[0] == before[0]
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.mark.parametrize("when", ["threads", "no threads"])
def test_a_forked_child(backend, when):
    if backend == "cuda":
        pytest.skip("CUDA does not survive fork()")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_ANOTHER_PROCESS, backend, when],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# ---- autograd and the compiler --------------------------------------------------------------------


def gradients(x, qparams, grad):
    """The result and the gradient of a backward pass."""
    x = x.detach().requires_grad_()
    y = quantkit.fake_quantize(x, qparams)
    y.backward(grad)
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_backward_pass(dtype, backend):
    if backend == "cuda":
        pytest.skip("the proxy for other devices has operators only")
    for kind in KINDS:
        x, *rest = inputs((9, 5003), dtype, kind, [1, -1], 3)
        grad = inputs((9, 5003), dtype, "denormal", None, 4)[0]
        args = (x, *rest, -100, 100)
        qparams = quantkit.QuantizationParams(*args[1:])
        right = (
            reference.fake_quantize_op(*args),
            reference.fake_quantize_backward_op(grad, *args),
        )
        results = []

        def work(i, call=(x, qparams, grad), results=results):
            if i:
                enter(HARSH)
            before = state()
            results.append(gradients(*call))
            results.append(before[0] == state()[0])

        in_threads(work, 2)
        for mode in (Mode("up"), HARSH):
            with environment(mode):
                results.append(gradients(x, qparams, grad))
        for result in results:
            assert result is True or assert_same(result, right) is None


def test_a_compiled_call(backend):
    if backend == "cuda":
        pytest.skip("the proxy for other devices has operators only")

    def everything(x):
        q, x_hat, p = quantkit.quantize_dequant(x, True, sym=False)
        return q, x_hat, p.scale, p.zero_point, quantkit.fake_quantize(x, p)

    x = inputs((9, 5003), torch.float32, "denormal", [1, -1], 5)[0]
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    compiled(x)
    chosen = reference.quantize_dequantize_op(x, [1, -1], -128, 127, 1e-8, False, torch.int8)
    right = (*chosen, reference.fake_quantize_op(x, *chosen[2:], -128, 127))
    for mode in MODES:
        with environment(mode):
            before = state()
            result = compiled(x)
            after = state()
        assert_same(tuple(result), right)
        assert after[0] == before[0]
