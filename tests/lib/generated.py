"""Generated cases: hypothesis strategies for whole calls of the operators, and the check of one.

A failure shrinks to a short `Case(...)`: put it into KEPT (tests/test_generated.py), where it stays.
"""

import itertools
import math
import os
import random
from dataclasses import dataclass, replace
from functools import cache

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from lib.cases import (
    CODES,
    FLOATS,
    SPECIAL,
    STRIDES,
    argument_names,
    assert_same_kind,
    call_of,
    check_results,
    flat,
    invoke,
    on_meta,
    parameter_shape,
    takes_format,
)

import quantkit
from quantkit import _load
from quantkit._checks import REAL_DTYPES
from quantkit.formats import CODED_SCALES, E4M3, E8M0, FORMATS, OF_NAME
from quantkit.operators import OPERATORS, overloads
from quantkit.schemes import POWERS

# Another one each time; QUANTKIT_SEED=N repeats a run (the last line of the tests shows it).
SEED = int(os.environ.get("QUANTKIT_SEED") or random.SystemRandom().randrange(2**32))
FEW_ELEMENTS = 20_000
META_EVERY = 8  # a case in so many: they cost a third of all the rest
# No code of their own, or arguments of their own.
OTHERS = {"fake_quantize", "fake_quantize.format", "linear_w8a8"}
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True)
class Data:
    """A tensor: normal numbers of a seed times 10^magnitude, some put where they are wanted."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    seed: int = 0
    magnitude: int = 0
    round_to: float = 0.0  # 0: as they are
    put: tuple[tuple[int, float], ...] = ()
    layout: str = "contiguous"
    offset: int = 0  # elements into its memory

    def tensor(self):
        generator = torch.Generator().manual_seed(self.seed)
        t = torch.randn(self.shape, generator=generator, dtype=torch.float64) * 10**self.magnitude
        if self.round_to:
            t = torch.round(t / self.round_to) * self.round_to
        for at, value in self.put:
            if t.numel():
                t.view(-1)[at % t.numel()] = value
        if self.dtype.is_floating_point:
            half = self.dtype in FLOATS[2:]
            t = t.to(torch.float32).to(self.dtype) if half else t.to(self.dtype)
        else:
            t = t.nan_to_num().clamp(0 if self.dtype in UNSIGNED else -120, 120).to(self.dtype)
        return moved(STRIDES[self.layout](t), self.offset)


def as_list(sizes):
    return None if sizes is None else list(sizes)


def moved(t, by):
    """t with its strides, `by` elements into memory of its own."""
    if by == 0 or t.numel() == 0:
        return t
    reach = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1
    memory = torch.zeros(reach + by, dtype=t.dtype)
    memory[by:] = t.as_strided((reach,), (1,))
    return memory.as_strided(t.shape, t.stride(), by)


@dataclass(frozen=True)
class Case:
    """The arguments of every operator that takes parameters, or (without a scale) that chooses them.

    Of version 1's operators, or (with a format) of those that take its name.
    """

    x: Data  # and q, of version 1
    scale: Data | None = None
    zero_point: Data | None = None
    limits: tuple[int, int] = (-128, 127)
    code: torch.dtype = torch.int8
    format: str | None = None
    block_size: tuple[int, ...] | None = None
    eps: float = 1e-8
    symmetric: bool = True
    include_zero: bool = False
    grad: Data | None = None  # None: x's kind of numbers, others
    scale_rule: str | None = None
    scale_dtype: torch.dtype | None = None  # of the given scale too, where it is coded
    global_scale: Data | None = None
    round_first: bool = False
    seed: tuple[int, int] | None = None
    index: tuple[int, ...] | None = None
    output_dtype: torch.dtype | None = None
    over: tuple[int, ...] | None = None
    out: str | None = None  # the layout of `out=` tensors, tried too

    def table(self):
        """Values by argument."""
        x, (low, high) = self.x.tensor(), self.limits
        table = {
            "x": x, "q": x if self.format is None else self.codes(), "q_min": low, "q_max": high,
            "dtype": self.code, "format": self.format, "block_size": as_list(self.block_size),
            "over": as_list(self.over), "index": as_list(self.index), "seed": self.seed,
            "global_scale": self.global_scale and self.global_scale.tensor(),
            "round_first": self.round_first, "output_dtype": self.output_dtype,
        }  # fmt: skip
        if self.seed is not None:
            table["seed"] = torch.tensor(self.seed)
        if self.format is None and x.is_floating_point():
            grad = self.grad or replace(self.x, seed=self.x.seed + 1)
            table |= {"grad": grad.tensor(), "mask": x > 0}
        if self.scale is None:
            options = ("eps", "symmetric", "include_zero", "scale_rule", "scale_dtype")
            return table | {k: getattr(self, k) for k in options}
        scale = self.scale.tensor()
        if self.scale_dtype in CODED_SCALES:
            scale = torch.empty_like(scale, dtype=self.scale_dtype).copy_(scale)
        return table | {"scale": scale, "zero_point": self.zero_point and self.zero_point.tensor()}

    def calls(self):
        """(operator, arguments) of each call."""
        table = self.table()
        for name in (name for name in OPERATORS if name not in OTHERS):
            fits = takes_format(name) == (self.format is not None)
            if name == "aminmax":
                fits = self.scale is None
            if fits and {*argument_names(name)[0]} <= table.keys():
                yield name, call_of(name, table)

    def codes(self):
        """Any bytes, in the layout of x."""
        f, shape = OF_NAME[self.format], self.x.shape
        if shape and f.per_byte > 1:
            shape = (*shape[:-1], shape[-1] // f.per_byte)
        size = f.storage.itemsize
        generator = torch.Generator().manual_seed(self.x.seed)
        kind = {1: torch.uint8, 2: torch.int16}[size]
        limits = torch.iinfo(kind)
        q = torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(kind)
        return STRIDES[self.x.layout if shape else "contiguous"](q).view(f.storage)


def outcome(call, args):
    """The result, or the error: its type, of which operators have no TypeError, and message."""
    try:
        return invoke(call, args)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"RuntimeError: {error}"


def check(case):
    """Every call of a case on every instruction set: (calls, how many gave a result and no error)."""
    calls = results = 0
    before, threads = _load.extension.isa(), torch.get_num_threads()
    if math.prod(case.x.shape) > FEW_ELEMENTS:
        torch.set_num_threads(3)
    try:
        for name, args in case.calls():
            calls += 1
            results += check_call(name, args, case.out, case.x.seed % META_EVERY == 0)
    finally:
        _load.extension.set_isa(before)
        torch.set_num_threads(threads)
    return calls, results


def check_call(name, args, layout, asks_meta):
    functional, _ = overloads(name)
    expected = outcome(OPERATORS[name].reference, args)
    refused = isinstance(expected, str)
    if asks_meta:
        check_meta(outcome(functional, on_meta(args)), expected)
    for isa in quantkit.backend().isas:
        if isa == "cuda_emu" and args[0].numel() > FEW_ELEMENTS:
            continue  # a tenth of a second
        _load.extension.set_isa(isa)
        if refused:
            assert outcome(functional, args) == expected, (name, isa)
        else:
            check_results(name, args, expected, layout)
    return not refused


def check_meta(actual, expected):
    """What compilers are told: dtypes, shapes and strides, or the same error."""
    if isinstance(expected, str):
        assert actual == expected
        return
    for a, e in zip(flat(actual), flat(expected), strict=True):
        # empty_like: torch gives empty tensors other strides on this device.
        assert_same_kind(a, torch.empty_like(on_meta([e])[0]))


# ---- strategies -----------------------------------------------------------------------------------


def is_small(shape):
    """Also where a size is 0: the layouts make a larger tensor first."""
    return math.prod(n or 1 for n in shape) <= FEW_ELEMENTS


# Made once: a strategy that is made anew for every case takes longer than the case.

SIZES = st.integers(1, 9) | st.sampled_from([0, 1, 16, 31, 32, 33, 64, 127, 128, 257, 1025])
# Small ones; of more dimensions; and, now and then, so many elements that threads share them.
FEW = st.lists(SIZES, max_size=4).map(tuple).filter(is_small)
MANY = st.sampled_from([(70_001,), (3, 20_011), (20_011, 3), (300, 128), (33, 7, 5, 31)])
# Torch's own operators end at 64 dimensions, some of ours at the same place.
DEEP = st.tuples(st.integers(0, 40), SIZES, st.integers(0, 40)).map(
    lambda drawn: (1,) * drawn[0] + (drawn[1],) + (1,) * drawn[2]
)
SHAPES = st.one_of(
    *[FEW] * 56, *[st.lists(st.integers(1, 3), min_size=5, max_size=7).map(tuple)] * 6, DEEP, MANY
)
LOW = (-128, -127, 0, -8, 1, -32768, -300)
HIGH = (127, 255, 7, 1, 15, 32767, 400)
NUMBERS, SCALE_SIZES, ZERO_POINT_SIZES = (
    st.sampled_from(powers)
    for powers in ((-3, -1, 0, 1, 3), (-1, -2, 0, 1, 5, -5, -38), (1, 0, 2, 4))
)
SEEDS, INDEX, YES = st.integers(0, 2**16), st.integers(0, 2**20), st.booleans()
ROUND_TO = st.sampled_from([0.0, 0.0, 0.5, 0.125])
PUT = st.lists(st.tuples(INDEX, st.sampled_from(SPECIAL) | st.floats(width=32)), max_size=3)
OFFSETS = st.sampled_from([0, 0, 1, 3, 7])
OUTS = st.sampled_from([None] * 6 + ["contiguous", "transposed", "strided"])
EPS = st.sampled_from([1e-8, 1e-5, 1e-45, 2.0])


@cache
def one_of(*choices):
    return st.sampled_from(choices)


@cache
def divisor_of(n):
    return st.sampled_from([d for d in range(1, n + 1) if n % d == 0] if n else [1])


def draw_data(draw, shape, dtype, magnitudes=NUMBERS):
    usable = [name for name in STRIDES if shape and (name != "expanded" or shape[0] > 0)]
    return Data(
        shape,
        dtype,
        draw(SEEDS),
        draw(magnitudes),
        draw(ROUND_TO),
        tuple(draw(PUT)),
        draw(one_of(*usable)) if usable else "contiguous",
        draw(OFFSETS),
    )


def draw_parameter_shape(draw, shape):
    """One that fits x's by a rule: none, blocks, or a lower rank that broadcasts."""
    kind = draw(one_of("tensor", "lower rank", "blocks", "blocks"))
    if kind == "tensor" or not shape:
        return ()
    if kind == "lower rank":
        tail = shape[draw(one_of(*range(len(shape)))) :]
        return tuple(n if draw(YES) else 1 for n in tail)
    return tuple(draw(divisor_of(n)) for n in shape)


def draw_limits(draw, low, high):
    return tuple(
        sorted(draw(one_of(*(n for n in side if low <= n <= high))) for side in (LOW, HIGH))
    )


@st.composite
def given_cases(draw):
    shape, code = draw(SHAPES), draw(one_of(*CODES))
    dtype = draw(one_of(*FLOATS, *FLOATS, *CODES, *CODES, *REAL_DTYPES))
    s_shape = draw_parameter_shape(draw, shape)
    z_shape = s_shape if draw(YES) else draw_parameter_shape(draw, shape)
    own = dtype if dtype in FLOATS else torch.float32
    s_dtype = draw(one_of(own, own, *FLOATS))
    z_dtype = draw(one_of(s_dtype, s_dtype, *FLOATS, torch.int32, torch.int8))
    return Case(
        draw_data(draw, shape, dtype),
        draw_data(draw, s_shape, s_dtype, SCALE_SIZES),
        draw_data(draw, z_shape, z_dtype, ZERO_POINT_SIZES),
        draw_limits(draw, *CODES[code]),
        code,
        grad=draw_data(draw, shape, dtype) if draw(YES) else None,
        out=draw(OUTS),
    )


@st.composite
def chosen_cases(draw):
    shape, code, symmetric = draw(SHAPES), draw(one_of(*CODES)), draw(YES)
    blocks = None
    if draw(one_of(True, True, False)):
        blocks = tuple(-1 if draw(YES) else draw(divisor_of(n)) for n in shape)
    return Case(
        draw_data(draw, shape, draw(one_of(*FLOATS, *FLOATS, torch.int8, torch.int64))),
        limits=draw_limits(draw, *CODES[code]),
        code=code,
        block_size=blocks,
        eps=draw(EPS),
        symmetric=symmetric,
        include_zero=not symmetric and draw(YES),
        out=draw(OUTS),
    )


FLOAT_LIMITS, FORMAT_EPS = (1, 2, 4, 6, 16, 448, 57344, 20), (1e-8, 2.0**-126, 0.5, 2.0**-6)
SEED_WORDS = st.sampled_from([0, 1, -1, 2**32, 2**40 + 3, -(2**63), 2**63 - 1])
ENDS, WITHOUT_AND_WITH = (0, 1, 7, 2**35 + 5, 2**63 - 1), (None, None, "whole", "part", "strided")
RULES_AND_DTYPES = [(None, None)] * 3 + [("half_range", None), (None, E4M3.dtype)] * 2
RULES_AND_DTYPES += itertools.product((None, *POWERS), (None, torch.float32, *[E8M0] * 3))


def draw_scales(draw, case, f, s_shape):
    """A rule, a dtype of scale and a global scale, of which a few are refused together."""
    rule, scale_dtype = draw(one_of(*RULES_AND_DTYPES))
    even, half_range = (rule == word for word in ("even", "half_range"))
    if (even and f.has_zero_point) or (half_range and not (f.has_zero_point and f.low < 0)):
        rule = None
    case = replace(case, scale_rule=rule, scale_dtype=scale_dtype)
    is_power = scale_dtype == E8M0 or rule in POWERS
    if draw(one_of(True, False, False)) and (not is_power or draw(INDEX) % 8 == 0):
        shape = s_shape if draw(YES) else tuple(draw(divisor_of(n)) for n in s_shape)
        shape = () if draw(YES) else shape
        case = replace(
            case, global_scale=draw_data(draw, shape, draw(one_of(*FLOATS)), SCALE_SIZES)
        )
    return case


def draw_draws(draw, case):
    """Random rounding, of a whole, of a part of a larger tensor, or of places anywhere."""
    kind = draw(one_of(*WITHOUT_AND_WITH))
    if kind is None:
        return case
    seed, index, shape = (draw(SEED_WORDS), draw(SEED_WORDS)), None, case.x.shape
    if kind == "part" and len(shape) <= 8:  # of more the larger one has more places than there are
        start = [draw(one_of(0, 1, 5)) for _ in shape]
        larger = [n + at + 3 for n, at in zip(shape, start, strict=True)]
        index = quantkit.shard_index(larger, start)
    elif kind == "strided":
        strides = [draw(one_of(0, 1, -1, 3, 2**20, -(2**40))) for _ in shape]
        ends = [s * (n - 1) for s, n in zip(strides, shape, strict=True) if n]
        high, low = (sum(e for e in ends if (e > 0) == above) for above in (True, False))
        end = draw(one_of(*ENDS))
        index = (end - high if end == ENDS[-1] else end - low, *strides)
        index = (min(index[0], 2**63 - 1), *strides)
    first = case.round_first and draw(INDEX) % 32 == 0  # refused
    return replace(case, seed=seed, index=index, round_first=first)


@st.composite
def format_cases(draw):
    f = draw(one_of(*FORMATS))
    shape = draw(SHAPES)
    if shape and draw(one_of(True, True, True, False)):
        shape = (*shape[:-1], shape[-1] // f.per_byte * f.per_byte)
    if f.has_zero_point:
        limits = draw_limits(draw, f.low, f.high) if draw(YES) else (f.low, f.high)
    else:
        high = draw(one_of(f.high, f.high, *FLOAT_LIMITS))
        limits = (-high, high)
    blocks, over = (
        tuple(draw(one_of(-1, 1, 2, 3, 4, 32, 128)) for _ in shape) if draw(YES) else None
        for _ in range(2)
    )
    case = Case(
        draw_data(draw, shape, draw(one_of(*FLOATS, *FLOATS, torch.int8, torch.int64))),
        limits=limits,
        format=f.name,
        block_size=blocks,
        round_first=f.has_zero_point and draw(YES),
        output_dtype=draw(one_of(None, None, torch.float16, torch.bfloat16, torch.float32)),
        over=over,
        out=draw(OUTS),
    )
    case = draw_draws(draw, case)
    s_shape = parameter_shape(shape, blocks)
    if draw(YES):
        symmetric = not f.has_zero_point or draw(YES)
        case = replace(
            case,
            eps=draw(one_of(*FORMAT_EPS)),
            symmetric=symmetric,
            include_zero=not symmetric and draw(YES),
        )
        return draw_scales(draw, case, f, s_shape) if symmetric else case
    if blocks is None:
        s_shape = draw_parameter_shape(draw, shape)
    case = draw_scales(draw, case, f, s_shape)
    z_shape = s_shape if draw(YES) else ()
    scale = draw_data(
        draw, s_shape, draw(one_of(torch.float32, torch.float32, *FLOATS)), SCALE_SIZES
    )
    zero_point = None
    if f.has_zero_point and draw(YES):
        kinds = one_of(torch.float32, *FLOATS, torch.int32, torch.int8)
        zero_point = draw_data(draw, z_shape, draw(kinds), ZERO_POINT_SIZES)
    return replace(case, scale=scale, zero_point=zero_point)


CASES = st.one_of(given_cases(), chosen_cases(), format_cases())


def run_many(count, first_seed):
    """Checks so many new cases: (cases, calls, results). Raises with the smallest case that fails."""
    found = []

    @seed(first_seed)
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(CASES)
    def generated(case):
        found.append(check(case))

    generated()
    return len(found), *map(sum, zip(*found, strict=True))
