"""A thread's floating-point environment: its modes, and calls of every operator in them."""

import contextlib
import ctypes
import ctypes.util
import functools
import itertools
import os
import platform
import signal
import struct
from dataclasses import dataclass
from functools import partial

import torch
from lib.cases import (
    FLOATS,
    LIMITS,
    STRIDES,
    assert_same,
    call_of,
    codes,
    invoke,
    ops,
    parameter_shape,
    takes_format,
    values,
)

from quantkit import _load
from quantkit.formats import OF_NAME
from quantkit.operators import OPERATORS

MACHINE = platform.machine()

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


def state_of(mode):
    with environment(mode):
        return state()


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
        _, names, function, *_ = OPERATORS[name]
        self.right = (invoke(function, args) if right is None else right,)
        if isinstance(self.right[0], tuple):
            (self.right,) = self.right
        self.outs = None
        if out:
            outs = (STRIDES["strided" if t.dim() else "contiguous"](t) for t in self.right)
            self.outs = {n: t.clone() for n, t in zip(names, outs, strict=True)}

    def __call__(self):
        if self.outs is None:
            made = invoke(getattr(ops, self.name), self.args)
            return made if isinstance(made, tuple) else (made,)
        for out in self.outs.values():
            out.zero_()
        invoke(partial(getattr(ops, self.name).out, **self.outs), self.args)
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


def of_format(shape, layout, scale, zero_point, turn):
    """What .format overloads take instead: an integer format, or one of floats, packed where it fits."""
    f = OF_NAME[("int8", "float8_e4m3fn" if shape[-1] % 2 else "float4_e2m1fn")[turn % 2]]
    zero_point = zero_point if f.has_zero_point else None
    q = STRIDES[layout](codes(f, shape).view(torch.uint8)).view(f.storage)
    return {
        "q": q, "scale": scale, "zero_point": zero_point, "q_min": f.low, "q_max": f.high,
        "format": f.name, "symmetric": True, "include_zero": False,
    }  # fmt: skip


@functools.cache
def made(dtype, shape, layout):
    """(operator, arguments, right result) of every operator."""
    results = []
    for i, (kind, blocks) in enumerate(itertools.product(KINDS, BLOCKS)):
        x, scale, zero_point = inputs(shape, dtype, kind, blocks, i)
        x = STRIDES[layout](x)
        table = {
            "x": x, "scale": scale, "zero_point": zero_point, "grad": x.flip(0), "mask": x > 0,
            "q": STRIDES[layout](torch.arange(x.numel()).view(shape).to(torch.int8)),
            "block_size": blocks, "over": None if i % 2 else blocks,
            "eps": 1e-8 if i % 2 else max(torch.finfo(dtype).smallest_normal / 1000, 1e-307),
            "symmetric": i % 2 == 0, "include_zero": i % 4 == 3, "seed": torch.tensor([i, -i]),
            "index": [i, *[5] * x.dim()],
        }  # fmt: skip
        for name in OPERATORS:
            if takes_format(name):
                if (i + i // 4) % 2:
                    continue
                args = call_of(name, table | of_format(shape, layout, scale, zero_point, i // 2))
            elif name == "linear_w8a8":
                given = {"scale": scale.reshape(-1)[0].to(torch.float32), "bias": None}
                args = call_of(name, table | given)
            else:
                code, low, high = LIMITS[i % 3]
                args = call_of(name, table | {"dtype": code, "q_min": low, "q_max": high})
            results.append((name, args, Case(name, args).right))
    return results


def cases_of(dtype, shape, layout="contiguous", out=False):
    return [Case(*each, out=out) for each in made(dtype, shape, layout)]


def in_parent_and_child(isa):
    """Calls in a process and its child: forked before there were threads, and again among some."""
    _load.extension.set_isa(isa)
    cases = cases_of(torch.float32, (9, 5003))[::3]
    for some in (False, True):
        torch.set_num_threads(3)
        enter(HARSH)
        if some:
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
