"""Generated cases: hypothesis strategies for whole calls of the operators, and the check of one.

A failure shrinks to a short `Case(...)`: put it into KEPT (tests/test_generated.py), where it stays.
"""

import math
import os
import random
from dataclasses import dataclass
from functools import cache

import torch
from cases import CODES, FLOATS, SPECIAL, STRIDES, assert_same, offset
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import quantkit
from quantkit import _load, reference

# Another one each time; QUANTKIT_SEED=N repeats a run (the header of the tests shows it).
SEED = int(os.environ.get("QUANTKIT_SEED") or random.SystemRandom().randrange(2**32))
GIVEN = ("quantize", "dequantize", "_fake_quantize", "_fake_quantize_backward")
CHOSEN = ("choose_qparams", "dynamic_quantize", "quantize_dequantize")


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
            t = t.nan_to_num().clamp(0 if self.dtype == torch.uint8 else -120, 120).to(self.dtype)
        if self.offset:
            t = offset(t, self.offset)
        return STRIDES[self.layout](t)


@dataclass(frozen=True)
class Case:
    """One call of an operator."""

    operator: str
    x: Data  # q, for dequantize
    scale: Data | None = None
    zero_point: Data | None = None
    limits: tuple[int, int] = (-128, 127)
    code: torch.dtype = torch.int8
    block_size: tuple[int, ...] | None = None
    eps: float = 1e-8
    symmetric: bool = True
    include_zero: bool = False

    def arguments(self):
        x = self.x.tensor()
        if self.operator in GIVEN:
            scale, zero_point = self.scale.tensor(), self.zero_point.tensor()
            if self.operator == "dequantize":
                return x, scale, zero_point
            if self.operator == "quantize":
                return x, scale, zero_point, *self.limits, self.code
            grad = (x,) if self.operator == "_fake_quantize_backward" else ()
            return *grad, x, scale, zero_point, *self.limits
        code = () if self.operator == "choose_qparams" else (self.code,)
        blocks = None if self.block_size is None else list(self.block_size)
        return x, blocks, *self.limits, self.eps, self.symmetric, *code, self.include_zero


def outcome(call, args):
    """The result, or the message of the refusal."""
    try:
        return call(*args)
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)


def check(case):
    """The case on every instruction set; whether it gave a result and no refusal."""
    operator = getattr(torch.ops.quantkit, case.operator)
    args = case.arguments()
    expected = outcome(getattr(reference, case.operator.lstrip("_") + "_op"), args)
    before = _load.extension.isa()
    for isa in quantkit.backend().isas:
        _load.extension.set_isa(isa)
        actual = outcome(operator, args)
        if isinstance(actual, str) or isinstance(expected, str):
            assert actual == expected, isa
        else:
            assert_same(actual, expected)
    _load.extension.set_isa(before)
    return not isinstance(expected, str)


# ---- strategies -----------------------------------------------------------------------------------
# Made once: a strategy that is made anew for every case takes longer than the case.

SIZES = st.integers(1, 9) | st.sampled_from([0, 1, 16, 31, 32, 33, 64, 127, 128, 257, 1025])
SHAPES = st.lists(SIZES, max_size=4).map(tuple).filter(lambda shape: math.prod(shape) <= 20_000)
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
    operator, shape = draw(one_of(*GIVEN)), draw(SHAPES)
    dtypes = (*FLOATS, *FLOATS, torch.int8, torch.int64, torch.bool)
    if operator == "dequantize":
        dtypes = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float32)
    elif operator == "_fake_quantize_backward":
        dtypes = FLOATS
    dtype, code = draw(one_of(*dtypes)), draw(one_of(*CODES))
    limits = draw_limits(draw, *(CODES[code] if operator == "quantize" else (-32768, 32767)))
    s_shape = draw_parameter_shape(draw, shape)
    z_shape = s_shape if draw(YES) else draw_parameter_shape(draw, shape)
    own = dtype if dtype in FLOATS else torch.float32
    s_dtype = draw(one_of(own, own, *FLOATS))
    z_dtype = draw(one_of(s_dtype, s_dtype, *FLOATS, torch.int32, torch.int8))
    scale = draw_data(draw, s_shape, s_dtype, SCALE_SIZES)
    zero_point = draw_data(draw, z_shape, z_dtype, ZERO_POINT_SIZES)
    return Case(operator, draw_data(draw, shape, dtype), scale, zero_point, limits, code)


@st.composite
def chosen_cases(draw):
    operator, shape = draw(one_of(*CHOSEN)), draw(SHAPES)
    dtype = draw(one_of(*FLOATS, *FLOATS, torch.int8, torch.int64))
    code, symmetric = draw(one_of(*CODES)), draw(YES)
    blocks = None
    if draw(one_of(True, True, False)):
        blocks = tuple(-1 if draw(YES) else draw(divisor_of(n)) for n in shape)
    return Case(
        operator,
        draw_data(draw, shape, dtype),
        limits=draw_limits(draw, *CODES[code]),
        code=code,
        block_size=blocks,
        eps=draw(EPS),
        symmetric=symmetric,
        include_zero=not symmetric and draw(YES),
    )


CASES = st.one_of(given_cases(), chosen_cases())


def run_many(count, first_seed):
    """Checks so many new cases; how many gave results. Raises with the smallest that fails."""
    results = []

    @seed(first_seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(CASES)
    def generated(case):
        results.append(check(case))

    generated()
    return len(results), sum(results)
