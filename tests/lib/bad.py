"""What is bad for each argument of operators and functions, and what an error must be."""

import contextlib
import copy
import dataclasses
import functools
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from lib.cases import argument_names, bits_of, flat, values
from torch._subclasses.fake_tensor import FakeTensor

import quantkit
from quantkit import QuantizationParams, _checks, ops, reference
from quantkit.operators import OPERATORS
from quantkit.schemes import RULES

UNKNOWN_RULE = f"scale_rule: expected {_checks.one_of((None, *RULES))}, got"

MODULES = {"quantkit": quantkit, "reference": reference}
# Those whose arguments are not the ones of linear_w8a8's operator.
FUNCTIONS = sorted(set(reference.__all__) - {"QuantizationParams", "linear_w8a8"})
SINGLE = {field.name for field in dataclasses.fields(ops.SingleOperators)}
X = values((4, 6), torch.float32, 1)
FOREIGN = {
    "complex": (lambda: torch.ones(4, 6, dtype=torch.complex64), "torch.complex64"),
    "float8": (lambda: torch.ones(4, 6).to(torch.float8_e5m2), "torch.float8_e5m2"),
    "quantized": (lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), "torch.qint8"),
    "sparse": (lambda: X.to_sparse(), "torch.sparse_coo"),
    "sparse csr": (lambda: X.to_sparse_csr(), "torch.sparse_csr"),
    "mkldnn": (lambda: X.to_mkldnn(), "torch._mkldnn"),
    "nested": (lambda: torch.nested.nested_tensor([X, X]), "nested"),
    "list": (lambda: [1.0, 2.0], "list"),
    "numpy": (lambda: X.numpy(), "ndarray"),
    "none": (lambda: None, "NoneType"),
}
SEED = torch.tensor([5, 2])
SCALE, ZERO = torch.full((4, 1), 0.25), torch.full((4, 1), 3.0)
CHOOSE = {"x": X, "block_size": [1, -1], "q_min": -128, "q_max": 127, "eps": 1e-8}
CHOOSE |= {"symmetric": False, "dtype": torch.int8, "include_zero": False}
GIVEN = {"x": X, "grad": X + 1, "scale": SCALE, "zero_point": ZERO, "q_min": -128, "q_max": 127}
GIVEN |= {"q": X.to(torch.int8), "dtype": torch.int8, "mask": X > 0}
GIVEN_LINEAR = {"x": X, "q": torch.ones(6, 6, dtype=torch.int8), "scale": torch.ones(6, 1)}
GIVEN_LINEAR |= {"bias": torch.ones(6)}
# What .format overloads take beside these. Of an int8 format: its results are those of version 1.
FORMAT = {"format": "int8", "block_size": [1, -1], "round_first": False}
FORMAT |= dict.fromkeys(("scale_dtype", "scale_rule", "global_scale"))
FORMAT |= {"seed": SEED, "index": [0, 6, 1]}
FORMAT |= {"output_dtype": torch.float32, "over": [1, -1]}


def arguments_of(name):
    """A valid call of an operator, by argument, with tensors of its own."""
    if name == "linear_w8a8":
        return copy.deepcopy(GIVEN_LINEAR)
    names = [n for some in argument_names(name) for n in some]
    valid = FORMAT | (CHOOSE if "eps" in names else GIVEN)
    return copy.deepcopy({n: valid[n] for n in names})


def bad_of(name, argument):
    """What is bad for an argument of an operator."""
    table = BAD[argument]
    if name == "linear_w8a8":
        return table | LINEAR[argument]
    if ".format" not in name and name not in SINGLE:
        return table
    if argument == "zero_point":
        table = without(table, "None", "none")  # stands for 0
    if argument == "block_size":
        table = without(table, *DIVIDING)  # a last block may be short
    if argument == "scale":
        table = without(table, *CODED)
    if argument in ("q_min", "q_max"):
        table = table | bad(ValueError, 128 if argument == "q_max" else -129)
    return table


@functools.cache
def results_of(name):
    _, names, function, *_ = OPERATORS[name]
    return dict(zip(names, flat(function(**arguments_of(name))), strict=True))


def outs_of(name):
    """Outputs of the right shape and dtype, with a pattern in them."""
    return {result: torch.full_like(t, 77) for result, t in results_of(name).items()}


# ---- what is bad ----------------------------------------------------------------------------------


class Bad(NamedTuple):
    """What the functions raise, and a maker of the value."""

    kind: type
    make: Callable[[], object]


def bad(kind, *bad_values):
    return {repr(v)[:40]: Bad(kind, lambda v=v: v) for v in bad_values}


def made(kind, **makers):
    return {label: Bad(kind, make) for label, make in makers.items()}


def without(table, *labels):
    return {k: v for k, v in table.items() if k not in labels}


BEYOND = (2**63, -(2**63) - 1, 2**64, 2**70)
NO_TENSORS = bad(TypeError, "s", 1j, (), {}, torch.int8) | made(
    TypeError, object=object, tensors=lambda: [X, X], numbers=lambda: [[1.0] * 6] * 4
)
CODED = {"e4m3fn": torch.float8_e4m3fn, "e8m0fnu": torch.float8_e8m0fnu}
KINDS = {label: Bad(TypeError, make) for label, (make, _) in FOREIGN.items()} | made(
    TypeError,
    conj=lambda: torch.ones(4, 6, dtype=torch.complex64).conj(),
    **{name: lambda d=dtype: torch.ones(4, 6).to(d) for name, dtype in CODED.items()},
    bits=lambda: torch.empty(4, 6, dtype=torch.bits8),
    uint1=lambda: torch.empty(4, 6, dtype=torch.uint1),
    quint8=lambda: torch.quantize_per_channel(X, SCALE[:, 0], ZERO[:, 0].int(), 0, torch.quint8),
    csc=lambda: X.to_sparse_csc(),
    bsr=lambda: X.to_sparse_bsr((2, 2)),
    jagged=lambda: torch.nested.nested_tensor([X, X], layout=torch.jagged),
)
TENSORS = NO_TENSORS | KINDS
NUMBERS = bad(TypeError, 1.5, 3, True)
SHAPES = {
    str(shape): Bad(ValueError, lambda s=shape: torch.ones(s))
    for shape in [
        (0,),
        (2,),
        (4,),
        (3, 1),
        (5, 1),
        (8, 1),
        (1, 4),
        (1, 7),
        (4, 12),
        (1, 4, 6),
        (0, 6),
    ]
}
META = made(RuntimeError, meta=lambda: torch.ones(4, 1, device="meta"))
META0 = made(RuntimeError, meta0=lambda: torch.ones((), device="meta"))
INTEGRAL = made(TypeError, int8=lambda: SCALE.to(torch.int8), bool=lambda: SCALE.bool())
INTEGRAL |= made(TypeError, uint8=lambda: SCALE.to(torch.float8_e8m0fnu).view(torch.uint8))
LIMITS = (
    bad(TypeError, None, "1", 1.5, float("nan"), 1j, [1], ())
    | made(TypeError, tensor=lambda: torch.ones(2))
    | bad(ValueError, *BEYOND)
)
FLAGS = bad(TypeError, "yes", "", [], [1], {}, torch.int8)
DIVIDING = bad(ValueError, [3, 1], [1, 4], (8, 1), [1, 12], [2**31, 1], [1, 2**63 - 1])
SIZES = (
    bad(TypeError, 3, 1.5, "12", [1.5, 2], ["1", 2], [None, 1], [[1], [2]], {1: 2}, torch.int8)
    | bad(ValueError, [], [1], (1, 2, 3), [0, 1], [1, 0], [-2, 1], [1, -(2**31)], [-(2**63), 1])
    | DIVIDING
    | bad(ValueError, *([v, 1] for v in BEYOND))
)
OVER = {label: b for label, b in SIZES.items() if label not in DIVIDING}
SEEDS = made(
    TypeError,
    floats=lambda: torch.zeros(2),
    int32=lambda: torch.zeros(2, dtype=torch.int32),
    flags=lambda: torch.zeros(2, dtype=torch.bool),
    one=lambda: torch.tensor(1),
    vector=lambda: torch.zeros(1, dtype=torch.int64),
    three=lambda: torch.zeros(3, dtype=torch.int64),
    column=lambda: torch.zeros(2, 1, dtype=torch.int64),
    empty=lambda: torch.zeros(0, dtype=torch.int64),
) | made(RuntimeError, meta=lambda: torch.zeros(2, dtype=torch.int64, device="meta"))
PLACES = (
    bad(TypeError, 3, 1.5, "012", [0, 1.5, 2], ["0", 6, 1], [None, 6, 1], [[0], [6], [1]])
    | bad(TypeError, {0: 6}, torch.int8)
    | bad(ValueError, [], [0], [0, 6], (0, 6, 1, 1), [-1, 6, 1], [0, -6, 1], [17, -6, 1])
    | bad(ValueError, [0, 6, -1], [4, 6, -1], [2**63 - 23, 6, 1], [2**63 - 1, 0, 1], [0, 2**62, 0])
    | bad(ValueError, [0, 0, 2**63 - 1], [-(2**63), 2**62, 2**62], [2**63 - 1, 6, -(2**63)])
    | bad(ValueError, *([v, 6, 1] for v in BEYOND), *([0, 6, v] for v in BEYOND))
)
NO_CODES = (
    torch.int32,
    torch.float32,
    torch.complex64,
    torch.bool,
    torch.qint8,
    torch.float8_e5m2fnuz,
)
NO_CODES = bad(TypeError, *NO_CODES, None, [torch.int8], 1j, object)
DTYPES = NO_CODES | bad(
    TypeError, "int8", torch.uint16, torch.float8_e4m3fn
)  # of version 1's operators

# By argument of the operators.
BAD = {
    "x": TENSORS | NUMBERS,
    "q": TENSORS | NUMBERS,
    "grad": TENSORS
    | NUMBERS
    | made(TypeError, double=lambda: X.double(), integers=lambda: X.int())
    | made(ValueError, rows=lambda: X[:2], flat=lambda: X.flatten(), one=lambda: X[0, 0])
    | made(RuntimeError, meta=lambda: X.to("meta")),
    "mask": TENSORS
    | NUMBERS
    | made(TypeError, floats=lambda: X, integers=lambda: X.to(torch.uint8))
    | made(ValueError, rows=lambda: X[:2] > 0, one=lambda: X[0, 0] > 0)
    | made(RuntimeError, meta=lambda: (X > 0).to("meta")),
    "scale": TENSORS | NUMBERS | SHAPES | META | META0 | INTEGRAL,
    "zero_point": TENSORS | NUMBERS | SHAPES | META | META0,
    "q_min": LIMITS | bad(ValueError, 128, -32769, 2**31, 2**63 - 1, -(2**63)),
    "q_max": LIMITS | bad(ValueError, -129, 32768, -(2**31) - 1, 2**63 - 1, -(2**63)),
    "eps": bad(TypeError, None, "1e-8", [1e-8], (), 1j, torch.int8)
    | bad(ValueError, 0, -0.0, -1, float("nan"), float("-inf"), -1e-300, -(2**63)),
    "symmetric": FLAGS,
    "include_zero": FLAGS,
    "block_size": SIZES,
    "over": OVER,
    "dtype": DTYPES,
    "format": bad(TypeError, None, 3, torch.int8, [], 1j)
    | bad(ValueError, "", "int9", "INT8", "int"),
    "scale_dtype": bad(TypeError, "float32", [], 1j, torch.float16, torch.uint8, torch.float8_e5m2),
    "output_dtype": bad(
        TypeError, "float32", [], 1j, torch.float64, torch.int8, torch.float8_e4m3fn
    ),
    "scale_rule": bad(TypeError, 3, [], torch.int8) | bad(ValueError, "", "half", "even"),
    "global_scale": bad(TypeError, "s", [1.0], 1j)
    | made(
        TypeError,
        int8=lambda: SCALE.to(torch.int8),
        **{name: lambda d=dtype: torch.ones(()).to(d) for name, dtype in CODED.items()},
    )
    | made(
        ValueError,
        vector=lambda: torch.ones(4),
        rows=lambda: torch.ones(3, 1),
        columns=lambda: torch.ones(1, 6),
        deeper=lambda: torch.ones(1, 1, 1),
    )
    | META0,
    "bias": without(TENSORS, "none") | NUMBERS | SHAPES | META,
    "seed": without(TENSORS, "none") | NUMBERS | SEEDS,
    "index": PLACES,
    "round_first": FLAGS,
}
# Of linear_w8a8, beside these.
LINEAR = {
    "x": made(TypeError, integers=lambda: X.int())
    | made(ValueError, scalar=lambda: X[0, 0], none=lambda: X[:, :0])
    | made(ValueError, wide=lambda: torch.ones(1, 1 << 17)),
    "q": made(TypeError, uint8=lambda: X.to(torch.uint8), floats=lambda: X)
    | made(ValueError, other=lambda: X[:, :5].to(torch.int8), flat=lambda: X[0].to(torch.int8)),
    "scale": made(TypeError, half=lambda: SCALE.half(), double=lambda: SCALE.double())
    | made(ValueError, rows=lambda: SCALE[:2], each=lambda: torch.ones(4, 6))
    | made(RuntimeError, meta=lambda: torch.ones(6, 1, device="meta")),
    "bias": made(TypeError, integers=lambda: torch.ones(4, dtype=torch.int32))
    | made(RuntimeError, meta=lambda: torch.ones(6, device="meta")),
}
# What torch turns into a number before an operator sees it; the functions take no such thing.
TURNED = made(TypeError, fraction=lambda: Fraction(1, 2), decimal=lambda: Decimal("0.5"))
TURNED |= made(TypeError, tensor0=lambda: torch.tensor(1))
HUGE = made(ValueError, tall=lambda: 10**400, low=lambda: -(10**400))
ENDLESS = 10**5000  # more digits than Python writes
HUGE |= made(ValueError, endless=lambda: ENDLESS, endlessly_low=lambda: -ENDLESS)
TURNED_FLAGS = TURNED | bad(TypeError, None, 0.5, 1j, float("nan"))
TURNED_SIZES = {f"[{k}, 1]": Bad(TypeError, lambda b=b: [b.make(), 1]) for k, b in TURNED.items()}
TURNED_SIZES |= made(ValueError, endless=lambda: [ENDLESS, 1], endlessly_low=lambda: [1, -ENDLESS])
TURNED_PLACES = {
    f"[{k}, 6, 1]": Bad(TypeError, lambda b=b: [b.make(), 6, 1]) for k, b in TURNED.items()
}
TURNED_PLACES |= made(
    ValueError, endless=lambda: [ENDLESS, 6, 1], endlessly_low=lambda: [0, 6, -ENDLESS]
)
TURNED_SEEDS = TURNED | HUGE | bad(TypeError, (1, 2, 3), [1], (1, None), (0.5, 1), (1, "2"))
TURNED_SEEDS |= bad(ValueError, *BEYOND, *((0, v) for v in BEYOND), [2**63, 0])


class Mute:
    def __repr__(self):
        raise NotImplementedError("no text")


MUTE = made(TypeError, mute=Mute, uint4=lambda: torch.empty(4, 6, dtype=torch.uint4))
LAZY = made(
    TypeError,
    lazy=lambda: torch.nn.LazyLinear(4).weight,
    lazy_buffer=lambda: torch.nn.LazyBatchNorm1d().running_mean,
)


# By argument of the functions; of qparams, by field.
CHOOSING = {
    "x": without(BAD["x"], *FOREIGN) | MUTE | LAZY,
    "per_channel": FLAGS | TURNED_FLAGS | MUTE,
    "channel_dim": bad(TypeError, None, "", 0.5, [0], 1j)
    | TURNED
    | MUTE
    | made(IndexError, endless=lambda: ENDLESS)
    | bad(IndexError, -3, 2, 2**31, 2**63 - 1, -(2**63), *BEYOND, 10**400),
    "dtype": NO_CODES | MUTE | bad(TypeError, 1, torch.strided, int) | bad(ValueError, "", "int9"),
    "eps": without(BAD["eps"], "None") | TURNED | HUGE | MUTE,
    "sym": FLAGS | TURNED_FLAGS | MUTE,
    "include_zero": FLAGS | TURNED_FLAGS | MUTE,
    "block_size": SIZES | TURNED_SIZES | MUTE,
    "over": OVER | TURNED_SIZES | MUTE,
    "q_min": without(BAD["q_min"], "None") | TURNED | HUGE | MUTE | bad(TypeError, torch.int8),
    "q_max": without(BAD["q_max"], "None") | TURNED | HUGE | MUTE | bad(TypeError, torch.int8),
    "scheme": MUTE
    | bad(TypeError, None, 3, [], torch.int8)
    | bad(ValueError, "", "int8", "INT8_TENSOR"),
    "compute_dtype": MUTE | bad(TypeError, "float32", 1, torch.float64, torch.float16, float),
    "round_first": FLAGS | TURNED_FLAGS | MUTE,
    **{k: BAD[k] | MUTE for k in ("scale_dtype", "scale_rule", "global_scale", "output_dtype")},
    "seed": without(BAD["seed"], "3", "True", "numbers") | MUTE | LAZY | TURNED_SEEDS,
    "index": PLACES | TURNED_PLACES | MUTE,
}
FIELDS = {
    "scale": without(BAD["scale"], *FOREIGN, *CODED, *NUMBERS, *SHAPES) | HUGE | MUTE | LAZY,
    "zero_point": without(BAD["zero_point"], *FOREIGN, *NUMBERS, *SHAPES) | HUGE | MUTE | LAZY,
    "q_min": BAD["q_min"] | TURNED | HUGE | MUTE | bad(TypeError, torch.int8),
    "q_max": BAD["q_max"] | TURNED | HUGE | MUTE | bad(TypeError, torch.int8),
    "dtype": without(CHOOSING["dtype"], "None", "''", "'int9'") | bad(TypeError, "int8", "int9"),
    "block_size": MUTE
    | bad(TypeError, 3, "12", (1.5, -1), ((1,), (2,)), torch.int8)
    | bad(ValueError, (0, 1), (1, -2), (1, 0), [2, -1], (-1, -1), (3, -1), (1, 4), (1, 7), (1, 2)),
    "compute_dtype": CHOOSING["compute_dtype"],
    "round_first": CHOOSING["round_first"],
    "global_scale": BAD["global_scale"] | MUTE,
}
QPARAMS = (
    MUTE
    | bad(TypeError, "s", [], {}, 1j, QuantizationParams)
    | made(
        TypeError,
        tensor=lambda: X,
        unfinished=lambda: SimpleNamespace(scale=SCALE, zero_point=ZERO, q_min=0),
    )
)


# ---- how it is refused ----------------------------------------------------------------------------


def seen(*tensors):
    """The tensors whose memory can be looked at."""
    plain = [t for t in tensors if isinstance(t, torch.Tensor) and not isinstance(t, FakeTensor)]
    plain = [t for t in plain if not torch.nn.parameter.is_lazy(t)]
    plain = [t for t in plain if not t.is_nested and t.layout is torch.strided]
    return [t for t in plain if t.device.type == "cpu" and t.dtype in _checks.REAL_DTYPES]


def state_of(tensors):
    return [bits_of(t.detach()) for t in seen(*tensors)]


@contextlib.contextmanager
def described(argument, label):
    """A failure inside says of which bad value it is."""
    try:
        yield
    except (AssertionError, pytest.fail.Exception) as error:
        raise AssertionError(f"{argument} = {label}: {error}") from error


def refused(kinds, names, call, tensors):
    """call raises one of kinds exactly, with a name in the message, and writes to no tensor."""
    before = state_of(tensors)
    with pytest.raises(Exception) as caught:
        call()
    error = caught.value
    assert type(error) in kinds, repr(error)
    if type(error) is not NotImplementedError:  # torch's own: no kernel for such a thing
        assert any(re.search(rf"\b{name}\b", str(error)) for name in names), repr(error)
    for bits, bits_after in zip(before, state_of(tensors), strict=True):
        assert torch.equal(bits, bits_after), "written"


def of_operators(b):
    return (RuntimeError, NotImplementedError) if b.kind is TypeError else (RuntimeError,)
