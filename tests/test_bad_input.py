"""Every argument of every operator and function fuzzed: one refusal that names it, nothing written."""

import copy
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from cases import assert_same, bits_of, values
from hypothesis import given, settings
from hypothesis import strategies as st
from test_errors import FOREIGN
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import quantkit
from quantkit import QuantizationParams, _checks, _load, reference

ops = torch.ops.quantkit
pytestmark = [
    pytest.mark.fallback,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]
MODULES = {"quantkit": quantkit, "reference": reference}
FUNCTIONS = sorted(set(reference.__all__) - {"QuantizationParams"})
X = values((4, 6), torch.float32, 1)
SCALE, ZERO = torch.full((4, 1), 0.25), torch.full((4, 1), 3.0)
CHOOSE = {"x": X, "block_size": [1, -1], "q_min": -128, "q_max": 127, "eps": 1e-8}
CHOOSE |= {"symmetric": False, "dtype": torch.int8, "include_zero": False}
GIVEN = {"x": X, "grad": X + 1, "scale": SCALE, "zero_point": ZERO, "q_min": -128, "q_max": 127}
GIVEN |= {"q": X.to(torch.int8), "dtype": torch.int8}


def arguments_of(name):
    """A valid call of an operator, by argument, with tensors of its own."""
    names = [a.name for a in getattr(ops, name).default._schema.arguments]
    valid = CHOOSE if "block_size" in names else GIVEN
    return copy.deepcopy({n: valid[n] for n in names})


def outs_of(name):
    """Outputs of the right shape and dtype, with a pattern in them."""
    _, results, function, _ = _load._OPERATORS[name]
    made = function(**arguments_of(name))
    made = made if isinstance(made, tuple) else (made,)
    return {r: torch.full_like(t, 77) for r, t in zip(results, made, strict=True)}


# ---- what is bad ----------------------------------------------------------------------------------


class Bad(NamedTuple):
    """What the functions raise, a maker of the value, and what the operators raise if not the same."""

    kind: type
    make: Callable[[], object]
    operator: type | None = None


def bad(kind, *bad_values, operator=None):
    return {repr(v)[:40]: Bad(kind, lambda v=v: v, operator) for v in bad_values}


def made(kind, **makers):
    return {label: Bad(kind, make) for label, make in makers.items()}


BEYOND = (2**63, -(2**63) - 1, 2**64, 2**70)
NO_TENSORS = bad(TypeError, "s", 1j, (), {}, torch.int8) | made(
    TypeError, object=object, tensors=lambda: [X, X], numbers=lambda: [[1.0] * 6] * 4
)
KINDS = {label: Bad(TypeError, make) for label, (make, _) in FOREIGN.items()} | made(
    TypeError,
    conj=lambda: torch.ones(4, 6, dtype=torch.complex64).conj(),
    float8_e5m2=lambda: torch.ones(4, 6).to(torch.float8_e5m2),
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
LIMITS = (
    bad(TypeError, None, "1", 1.5, float("nan"), 1j, [1], ())
    | made(TypeError, tensor=lambda: torch.ones(2))
    | bad(ValueError, *BEYOND, operator=RuntimeError)
)
FLAGS = bad(TypeError, "yes", "", [], [1], {}, torch.int8)
SIZES = (
    bad(TypeError, 3, 1.5, "12", [1.5, 2], ["1", 2], [None, 1], [[1], [2]], {1: 2}, torch.int8)
    | bad(ValueError, [], [1], (1, 2, 3), [0, 1], [1, 0], [-2, 1], [1, -(2**31)], [-(2**63), 1])
    | bad(ValueError, [3, 1], [1, 4], (8, 1), [1, 12], [2**31, 1], [1, 2**63 - 1])
    | bad(ValueError, *([v, 1] for v in BEYOND), operator=RuntimeError)
)
DTYPES = (torch.int32, torch.float32, torch.complex64, torch.bool, torch.uint16, torch.qint8)
DTYPES = bad(TypeError, *DTYPES, torch.float8_e4m3fn, None, "int8", [torch.int8], 1j, object)

# By argument of the operators.
BAD = {
    "x": TENSORS | NUMBERS,
    "q": TENSORS | NUMBERS,
    "grad": TENSORS
    | NUMBERS
    | made(TypeError, double=lambda: X.double(), integers=lambda: X.int())
    | made(ValueError, rows=lambda: X[:2], flat=lambda: X.flatten(), one=lambda: X[0, 0])
    | made(RuntimeError, meta=lambda: X.to("meta")),
    "scale": TENSORS | NUMBERS | SHAPES | META | META0 | INTEGRAL,
    "zero_point": TENSORS | NUMBERS | SHAPES | META | META0,
    "q_min": LIMITS | bad(ValueError, 128, -32769, 2**31, 2**63 - 1, -(2**63)),
    "q_max": LIMITS | bad(ValueError, -129, 32768, -(2**31) - 1, 2**63 - 1, -(2**63)),
    "eps": bad(TypeError, None, "1e-8", [1e-8], (), 1j, torch.int8)
    | bad(ValueError, 0, -0.0, -1, float("nan"), float("-inf"), -1e-300, -(2**63)),
    "symmetric": FLAGS,
    "include_zero": FLAGS,
    "block_size": SIZES,
    "dtype": DTYPES,
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


class Mute:
    def __repr__(self):
        raise NotImplementedError("no text")


MUTE = made(TypeError, mute=Mute, uint4=lambda: torch.empty(4, 6, dtype=torch.uint4))
LAZY = made(
    TypeError,
    lazy=lambda: torch.nn.LazyLinear(4).weight,
    lazy_buffer=lambda: torch.nn.LazyBatchNorm1d().running_mean,
)


def without(table, *labels):
    return {k: v for k, v in table.items() if k not in labels}


# By argument of the functions; of qparams, by field.
CHOOSING = {
    "x": without(BAD["x"], *FOREIGN) | MUTE | LAZY,
    "per_channel": FLAGS | TURNED_FLAGS | MUTE,
    "channel_dim": bad(TypeError, None, "", 0.5, [0], 1j)
    | TURNED
    | MUTE
    | made(IndexError, endless=lambda: ENDLESS)
    | bad(IndexError, -3, 2, 2**31, 2**63 - 1, -(2**63), *BEYOND, 10**400),
    "dtype": DTYPES | MUTE | bad(TypeError, 1, torch.strided, int),
    "eps": BAD["eps"] | TURNED | HUGE | MUTE,
    "sym": FLAGS | TURNED_FLAGS | MUTE,
    "include_zero": FLAGS | TURNED_FLAGS | MUTE,
    "block_size": SIZES | TURNED_SIZES | MUTE,
    "q_min": without(BAD["q_min"], "None") | TURNED | HUGE | MUTE | bad(TypeError, torch.int8),
    "q_max": without(BAD["q_max"], "None") | TURNED | HUGE | MUTE | bad(TypeError, torch.int8),
}
FIELDS = {
    "scale": without(BAD["scale"], *FOREIGN, *NUMBERS, *SHAPES) | HUGE | MUTE | LAZY,
    "zero_point": without(BAD["zero_point"], *FOREIGN, *NUMBERS, *SHAPES) | HUGE | MUTE | LAZY,
    "q_min": BAD["q_min"] | TURNED | HUGE | MUTE | bad(TypeError, torch.int8),
    "q_max": BAD["q_max"] | TURNED | HUGE | MUTE | bad(TypeError, torch.int8),
    "dtype": without(CHOOSING["dtype"], "None"),
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
    kind = b.operator or b.kind
    return (RuntimeError, NotImplementedError) if kind is TypeError else (kind,)


ARGUMENTS = [
    (name, argument, label)
    for name in _load._OPERATORS
    for argument in arguments_of(name)
    for label in BAD[argument]
]


@pytest.mark.parametrize(("name", "argument", "label"), ARGUMENTS)
def test_each_argument_of_each_operator(name, argument, label):
    b = BAD[argument][label]
    arguments, outs = arguments_of(name), outs_of(name)
    arguments[argument] = b.make()
    names = (
        (argument, "ScalarType") if argument == "dtype" else (argument,)
    )  # torch converts dtypes
    tensors = [*arguments.values(), *outs.values()]
    operator = getattr(ops, name)
    for call in (lambda: operator(**arguments), lambda: operator.out(**arguments, **outs)):
        refused(of_operators(b), names, call, tensors)


@pytest.mark.skipif(_load.extension is None, reason="torch crashes where it makes a dtype of them")
@pytest.mark.parametrize("number", [3, 44, -1, 99, 1000])
@pytest.mark.parametrize("name", ["quantize", "dynamic_quantize", "quantize_dequantize"])
def test_numbers_of_other_dtypes_or_of_none(name, number):
    arguments, outs = arguments_of(name) | {"dtype": number}, outs_of(name)
    operator, tensors = getattr(ops, name), [*arguments_of(name).values(), *outs.values()]
    for call in (lambda: operator(**arguments), lambda: operator.out(**arguments, **outs)):
        refused((RuntimeError,), ("dtype", "ScalarType"), call, tensors)


@pytest.mark.parametrize("name", _load._OPERATORS)
def test_limits_and_flags_that_exclude_each_other(name):
    arguments = arguments_of(name)
    cases = [{"q_min": 5, "q_max": 4}, {"q_min": 2**63 - 1, "q_max": -(2**63)}]
    cases += [{"q_max": 128, "dtype": torch.int8}, {"q_min": -1, "dtype": torch.uint8}]
    cases += [{"symmetric": True, "include_zero": True}]
    for case in cases:
        if case.keys() <= arguments.keys():
            call = arguments | case
            for tensors, run in (
                ({}, getattr(ops, name).default),
                (outs_of(name), getattr(ops, name).out),
            ):
                refused(
                    (ValueError,), case, lambda c=call, t=tensors, r=run: r(**c, **t),
                    [*call.values(), *tensors.values()],
                )  # fmt: skip


@pytest.mark.parametrize("name", ["choose_qparams", "dynamic_quantize", "quantize_dequantize"])
def test_empty_tensors_have_no_parameters_to_choose(name):
    for shape in ((0,), (4, 0), (0, 6), (2, 0, 3)):
        for blocks in (None, [-1] * len(shape), [1] * len(shape)):
            arguments = arguments_of(name) | {"x": torch.empty(shape), "block_size": blocks}
            outs = outs_of(name)
            operator = getattr(ops, name)
            refused((ValueError,), ("x",), lambda a=arguments, o=operator: o(**a), [])
            refused(
                (ValueError,), ("x",), lambda a=arguments, o=operator, t=outs: o.out(**a, **t),
                outs.values(),
            )  # fmt: skip


@pytest.mark.parametrize("name", _load._OPERATORS)
def test_calls_that_do_not_fit_the_schema(name):
    arguments, outs = arguments_of(name), outs_of(name)
    operator, positional = getattr(ops, name), list(arguments.values())
    tensors = [*positional, *outs.values()]
    first, last_out = next(iter(arguments)), list(outs)[-1]
    calls = {
        first: lambda: operator.out(**outs),
        last_out: lambda: operator.out(*positional, **without(outs, last_out)),
        "foreign": lambda: operator.default(*positional, foreign=1),
        name: lambda: operator.out(*positional, *outs.values()),
    }
    for named, call in calls.items():
        refused((RuntimeError,), (named, name), call, tensors)


@pytest.mark.parametrize("name", _load._OPERATORS)
def test_meta_tensors_beside_real_ones(name):
    tensors = [k for k, v in arguments_of(name).items() if isinstance(v, torch.Tensor)]
    for argument in tensors:
        arguments, outs = arguments_of(name), outs_of(name)
        arguments[argument] = arguments[argument].to("meta")
        operator = getattr(ops, name)
        everything = [*arguments.values(), *outs.values()]
        if len(tensors) > 1:
            refused(
                (RuntimeError,), (argument,), lambda o=operator, a=arguments: o(**a), everything
            )
        refused(
            (ValueError, RuntimeError), (argument, *outs),
            lambda o=operator, a=arguments, t=outs: o.out(**a, **t), everything,
        )  # fmt: skip


@pytest.mark.parametrize("name", _load._OPERATORS)
def test_fake_tensors_beside_real_ones_are_torchs_own_error(name):
    every = {k: v for k, v in arguments_of(name).items() if isinstance(v, torch.Tensor)}
    operator = getattr(ops, name)
    for argument in (*every, *outs_of(name)):
        arguments, outs = arguments_of(name), outs_of(name)
        place = arguments if argument in arguments and argument in every else outs
        place[argument] = FakeTensorMode().from_tensor(place[argument])
        everything = [*arguments.values(), *outs.values()]
        refused(
            (AssertionError,), ("FakeTensors",),
            lambda o=operator, a=arguments, t=outs: o.out(**a, **t), everything,
        )  # fmt: skip
        if place is arguments and len(every) > 1:
            refused(
                (AssertionError,), ("FakeTensors",),
                lambda o=operator, a=arguments: o(**a), everything,
            )  # fmt: skip


@pytest.mark.parametrize("name", [n for n in _load._OPERATORS if not n.startswith("_")])
def test_meta_tensors_are_refused_as_real_ones_are(name):
    """Where all tensors are meta the checks are those of the fake kernels."""
    operator = getattr(ops, name)
    cases = {"q_min": 128, "block_size": [3, 1], "eps": 0.0, "dtype": torch.int32}
    cases |= {"scale": torch.ones(3, 1), "zero_point": torch.ones(4, 6, dtype=torch.complex64)}
    cases |= {"x": X.to(torch.complex64), "q": X.to(torch.complex64)}
    for argument in cases.keys() & arguments_of(name).keys():
        real = arguments_of(name) | {argument: cases[argument]}
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in real.items()}
        with pytest.raises(Exception) as caught:
            operator(**real)
        with pytest.raises(Exception) as caught_on_meta:
            operator(**meta)
        assert repr(caught_on_meta.value) == repr(caught.value)


@pytest.mark.parametrize("name", _load._OPERATORS)
def test_lazily_negated_tensors_change_no_refusal(name):
    """Torch hands such calls to a kernel in Python first."""
    operator = getattr(ops, name)
    first = next(iter(arguments_of(name)))
    arguments = arguments_of(name) | {first: torch.complex(X, X).conj().imag}
    tensors = [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and k != first]
    for argument in tensors:
        call = arguments | {argument: None}
        refused((RuntimeError,), (argument,), lambda c=call: operator(**c), call.values())
    for result, out in outs_of(name).items():
        for wrong in (None, out[:1], out.to(torch.int32)):
            outs = outs_of(name) | {result: wrong}
            refused(
                (RuntimeError, ValueError), (result,),
                lambda t=outs: operator.out(**arguments, **t),
                [*arguments.values(), *outs.values()],
            )  # fmt: skip


# ---- out= -----------------------------------------------------------------------------------------

RESULTS = [
    (name, result) for name, (_, results, *_) in _load._OPERATORS.items() for result in results
]


def put(name, result, out):
    """The operator refuses out in the place of a result, and leaves all tensors alone."""
    arguments, outs = arguments_of(name), outs_of(name) | {result: out}

    def check(*kinds):
        tensors = [*arguments.values(), *outs.values()]
        refused(kinds, (result,), lambda: getattr(ops, name).out(**arguments, **outs), tensors)

    return check


@pytest.mark.parametrize("label", [*TENSORS, *NUMBERS])
@pytest.mark.parametrize(("name", "result"), RESULTS)
def test_what_is_no_output(name, result, label):
    put(name, result, BAD["x"][label].make())(RuntimeError, NotImplementedError)


@pytest.mark.parametrize(("name", "result"), RESULTS)
def test_outputs_of_another_dtype_shape_or_device(name, result):
    right = outs_of(name)[result]
    shape = tuple(right.shape)
    for dtype in set(_checks.REAL_DTYPES) - {right.dtype}:
        put(name, result, torch.full(shape, 1, dtype=dtype))(RuntimeError)
    wrong = {(), (1,), shape[::-1], (1, *shape), (*shape, 1), (0, *shape[1:]), (shape[0],), (1, 1)}
    wrong |= {(shape[0] + 1, *shape[1:]), (shape[0] - 1, *shape[1:]), (1, *shape[1:])}
    for other in wrong - {shape}:
        put(name, result, torch.ones(other, dtype=right.dtype))(ValueError)
    put(name, result, right.to("meta"))(ValueError)


@pytest.mark.parametrize(("name", "result"), RESULTS)
def test_outputs_that_autograd_guards(name, result):
    right = outs_of(name)[result]
    with torch.inference_mode():
        inference = right.clone()
    put(name, result, inference)(RuntimeError)
    if right.is_floating_point():
        leaf = right.clone().requires_grad_()
        for out in (leaf, leaf * 1, leaf.view_as(leaf), leaf.expand_as(leaf)):
            put(name, result, out)(RuntimeError)


def at(memory, like, offset):
    """A tensor as like, in memory from byte offset on."""
    place = memory[offset : offset + like.numel() * like.element_size()]
    return place.view(like.dtype).view(like.shape)


def pairs_in_one_memory(name):
    """(result, the other tensor's name) for every pair that could share memory."""
    inputs = [k for k, v in arguments_of(name).items() if isinstance(v, torch.Tensor)]
    results = list(outs_of(name))
    for i, result in enumerate(results):
        yield from ((result, other) for other in [*inputs, *results[:i]])


PAIRS = [(name, *pair) for name in _load._OPERATORS for pair in pairs_in_one_memory(name)]


@pytest.mark.parametrize(("name", "result", "other"), PAIRS)
def test_outputs_in_the_memory_of_another_tensor(name, result, other):
    arguments, outs = arguments_of(name), outs_of(name)
    among = outs if other in outs and other not in arguments else arguments
    length = among[other].numel() * among[other].element_size()
    size = outs[result].numel() * outs[result].element_size()
    for shift in {0, 8, -8, length - 8, 8 - size} - ({0} if "fake_quantize" in name else set()):
        memory = torch.full((1024,), 77, dtype=torch.uint8)
        home = among[other]
        placed = at(memory, home, 256).copy_(home)
        lent = outs | {result: at(memory, outs[result], 256 + shift)}
        given = dict(arguments)
        (lent if among is outs else given)[other] = placed
        refused(
            (ValueError,), (rf"{result}: overlaps {other}",),
            lambda g=given, t=lent: getattr(ops, name).out(**g, **t),
            [memory, *given.values(), *lent.values()],
        )  # fmt: skip


@pytest.mark.parametrize(("name", "result"), RESULTS)
def test_outputs_that_overlap_themselves(name, result):
    right = outs_of(name)[result]
    memory = torch.full((100,), 77, dtype=right.dtype)
    strides = [(0, 1), (6, 0), (0, 0), (1, 1), (5, 1), (2, 3), (1, 2)]
    for rows, columns in strides if right.shape[1] > 1 else strides[:1]:
        put(name, result, memory.as_strided(right.shape, (rows, columns)))(ValueError)
    put(name, result, memory[: right.shape[1]].expand(right.shape))(ValueError)


@pytest.mark.skipif(_load.extension is None, reason="torch's own operators crash on such tensors")
def test_tensors_whose_memory_was_given_back():
    """As sharded training does with parameters that are not in use."""
    program = (
        "import torch, quantkit\n"
        "for name in ('x', 'scale', 'zero_point', 'out'):\n"
        "    for begin, step in ((0, 1), (5, 1), (5, 2)):\n"
        "        end = begin + 23 * step + 1\n"
        "        for kept in (0, begin, end - 1, end):\n"
        "            t = {k: torch.ones(4, 6) for k in ('x', 'scale', 'zero_point')}\n"
        "            t['out'] = torch.ones(4, 6, dtype=torch.int8)\n"
        "            memory = torch.ones(60, dtype=t[name].dtype)\n"
        "            t[name] = memory.as_strided((4, 6), (6 * step, step), begin)\n"
        "            memory.untyped_storage().resize_(kept * memory.element_size())\n"
        "            try:\n"
        "                torch.ops.quantkit.quantize.out(**t, q_min=0, q_max=1, dtype=torch.int8)\n"
        "                print('taken' if kept == end else f'{name} {begin} {step} {kept}')\n"
        "            except (RuntimeError, ValueError) as error:\n"
        "                print(str(error).split(':')[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.returncode
    each = [[name] * 3 + ["taken"] for name in ("x", "scale", "zero_point", "out")]
    assert done.stdout.splitlines() == [line for lines in each for line in lines * 3]


def test_results_too_large_for_memory():
    x = torch.ones(1).expand(2**61)
    with pytest.raises(RuntimeError, match=r"memory|overflow"):
        ops.quantize(x, torch.tensor(1.0), torch.tensor(0.0), -128, 127, torch.int8)
    with pytest.raises(RuntimeError, match=r"memory|overflow"):
        ops.choose_qparams(x, [1], -128, 127, 1e-8, True)


# ---- the functions --------------------------------------------------------------------------------


def function_cases():
    for function in FUNCTIONS:
        for argument in inspect.signature(getattr(reference, function)).parameters:
            if argument == "qparams":
                yield from ((function, argument, label) for label in QPARAMS)
                limits = set() if function.startswith("dequantize") else {"q_min", "q_max", "dtype"}
                for field in {"scale", "zero_point", *limits}:
                    yield from ((function, field, label) for label in FIELDS[field])
            else:
                table = CHOOSING["x" if argument == "q" else argument]
                yield from ((function, argument, label) for label in table)


def bad_call(function, argument, label):
    """(what is raised, the arguments) of a call of which one thing is bad."""
    first, *others = inspect.signature(getattr(reference, function)).parameters
    table = CHOOSING | {"q": CHOOSING["x"], "qparams": QPARAMS}
    qparams = QuantizationParams(SCALE, ZERO, -128, 127, dtype=torch.int8)
    valid = {first: X} | ({"qparams": qparams} if "qparams" in others else {})
    if argument in FIELDS and "qparams" in others:
        b = FIELDS[argument][label]
        return b.kind, valid | {"qparams": dataclasses.replace(qparams, **{argument: b.make()})}
    b = table[argument][label]
    channels = {"per_channel": True} if argument == "channel_dim" else {}
    return b.kind, valid | channels | {argument: b.make()}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("function", "argument", "label"), sorted(function_cases()))
def test_each_argument_of_each_function(function, argument, label, module):
    kind, arguments = bad_call(function, argument, label)
    call = getattr(MODULES[module], function)
    qparams = arguments.get("qparams")
    tensors = [*arguments.values(), getattr(qparams, "scale", 0), getattr(qparams, "zero_point", 0)]
    refused((kind,), (argument,), lambda: call(**arguments), tensors)


@pytest.mark.parametrize("module", MODULES)
def test_numbers_beyond_64_bits_are_numbers(module):
    module = MODULES[module]
    p = module.get_symmetric_qparams(X, eps=2**70)
    assert_same(p.scale, torch.tensor(2.0**70))
    q = module.quantize_tensor(X, QuantizationParams(2**70, -(2**70), -128, 127))
    assert (q == -128).all()


def test_functions_take_no_out():
    for function in FUNCTIONS:
        for module in MODULES.values():
            with pytest.raises(TypeError, match="'out'"):
                getattr(module, function)(X, out=X)


# ---- several at once ------------------------------------------------------------------------------

ALLOWED = (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError)
WEIRD = {
    "tensor": [
        lambda: X, lambda: X.t(), lambda: X[:, ::2], lambda: X[:0], lambda: X[0], lambda: X[0, 0],
        lambda: X.double(), lambda: X.half(), lambda: X.bfloat16(), lambda: X.to(torch.int8),
        lambda: X.to(torch.int64), lambda: X > 0, lambda: X[:1].expand(4, 6), lambda: X[None],
        lambda: torch.full((4, 6), float("nan")), lambda: torch.full((4, 6), float("inf")),
        lambda: torch.complex(X, X).conj().imag, lambda: torch.ones([1] * 40),
        lambda: SCALE, lambda: SCALE[:2], lambda: SCALE[0, 0], lambda: SCALE[:1].half(),
        lambda: torch.ones(6), lambda: torch.ones(4, 3), lambda: torch.zeros(4, 6),
        lambda: torch.ones(0), lambda: torch.ones(4, 0), lambda: -SCALE, lambda: SCALE.double(),
    ],
    "int": [lambda v=v: v for v in (-129, -128, -1, 0, 1, 127, 128, 255, 256, 32767, -32768, True)],
    "float": [lambda v=v: v for v in (1e-8, 1, True, 5e-324, 1e308, float("inf"), 2**62)],
    "flag": [lambda v=v: v for v in (True, False, 0, 1, 2)],
    "sizes": [
        lambda v=v: v
        for v in (None, [-1, -1], [2, 3], (4, 6), [1, 1], [-1], [1], [], [1, -1, -1], [True, 2])
    ],
    "dtype": [lambda v=v: v for v in (torch.int8, torch.uint8, torch.int16)],
}  # fmt: skip
KIND_OF = dict.fromkeys(("q_min", "q_max"), "int") | {"eps": "float", "block_size": "sizes"}
KIND_OF |= dict.fromkeys(("symmetric", "include_zero", "sym", "per_channel"), "flag")
KIND_OF |= {"dtype": "dtype", "channel_dim": "int"}


def outcome(call):
    """What call returns, or what it raises, which must be of an allowed type."""
    try:
        return call()
    except ALLOWED as error:
        assert type(error) in ALLOWED, repr(error)
        return error


def agree(actual, expected):
    if isinstance(expected, Exception) or isinstance(actual, Exception):
        assert isinstance(expected, Exception) and isinstance(actual, Exception), (actual, expected)
        return
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (actual, expected)), strict=True)
    for a, e in pairs:
        if isinstance(e, torch.Tensor):
            assert_same(a, e)
        else:
            assert a == e and type(a) is type(e)


def flat(result):
    """A function's result as a tuple of tensors, and of limits and dtypes; an exception as it is."""
    if isinstance(result, Exception):
        return result
    parts = result if isinstance(result, tuple) else (result,)
    spread = (vars(p).values() if isinstance(p, QuantizationParams) else (p,) for p in parts)
    return tuple(part for each in spread for part in each)


@st.composite
def spoiled_calls(draw):
    """An operator, with one to three of its arguments or outputs replaced by anything."""
    name = draw(st.sampled_from(list(_load._OPERATORS)))
    arguments, outs = arguments_of(name), outs_of(name)
    every = [(arguments, k) for k in arguments] + [(outs, k) for k in outs]
    for i in draw(st.lists(st.integers(0, len(every) - 1), min_size=1, max_size=3, unique=True)):
        place, argument = every[i]
        if draw(st.integers(0, 3)) == 0:
            makers = [b.make for b in BAD["x" if place is outs else argument].values()]
            place[argument] = draw(st.sampled_from(makers))()
        elif place is outs and draw(st.booleans()):
            place[argument] = draw(st.sampled_from([*outs.values(), *arguments.values()]))
        else:
            makers = WEIRD[KIND_OF.get(argument, "tensor")]
            place[argument] = copy.deepcopy(draw(st.sampled_from(makers))())
    return name, arguments, outs


def plain(everything):
    return all(
        not isinstance(t, torch.Tensor)
        or (not t.is_nested and t.layout is torch.strided and t.device.type == "cpu")
        for t in everything
    )


@given(spoiled_calls())
@settings(max_examples=400, deadline=None, print_blob=True)
def test_operators_do_as_the_reference_or_refuse(spoiled):
    name, arguments, outs = spoiled
    function = _load._OPERATORS[name][2]
    operator = getattr(ops, name)
    agree(outcome(lambda: operator(**arguments)), outcome(lambda: function(**arguments)))
    if not plain((*arguments.values(), *outs.values())):
        refused(
            ALLOWED, (*arguments, *outs), lambda: operator.out(**arguments, **outs),
            [*arguments.values(), *outs.values()],
        )  # fmt: skip
        return
    copied, copied_outs = copy.deepcopy((arguments, outs))
    reference_out = _load._out_overload(name, function, write=True)
    expected = outcome(lambda: reference_out(**copied, **copied_outs))
    before = state_of([*arguments.values(), *outs.values()])
    actual = outcome(lambda: operator.out(**arguments, **outs))
    agree(actual or (), expected or ())
    if actual is None:
        agree(tuple(outs.values()), tuple(copied_outs.values()))
        return
    after = state_of([*arguments.values(), *outs.values()])
    assert all(map(torch.equal, before, after))


@st.composite
def spoiled_function_calls(draw):
    """A function, with one to three of its arguments, or of the fields of qparams, replaced."""
    function = draw(st.sampled_from(FUNCTIONS))
    first, *others = inspect.signature(getattr(reference, function)).parameters
    table = CHOOSING | {"q": CHOOSING["x"]}
    if others == ["qparams"]:
        others, table = list(FIELDS), table | FIELDS
    chosen = st.lists(st.sampled_from([first, *others]), min_size=1, max_size=3, unique=True)
    values = {first: X}
    for argument in draw(chosen):
        makers = WEIRD[KIND_OF.get(argument, "tensor")]
        if draw(st.booleans()):
            makers = [b.make for b in table[argument].values()]
        values[argument] = draw(st.sampled_from(makers))()
    count = len(values) - (values[first] is X)
    if others != list(FIELDS):
        return function, values, count
    fields = {"scale": SCALE, "zero_point": ZERO, "q_min": -128, "q_max": 127} | values
    del fields[first]
    return function, {first: values[first], "qparams": QuantizationParams(**fields)}, count


@given(spoiled_function_calls())
@settings(max_examples=400, deadline=None, print_blob=True)
def test_functions_do_as_the_reference_or_refuse(spoiled):
    function, arguments, count = spoiled
    ours, theirs = (
        outcome(lambda m=m: getattr(m, function)(**arguments)) for m in MODULES.values()
    )
    if isinstance(ours, Exception) and isinstance(theirs, Exception) and count == 1:
        assert repr(ours) == repr(theirs)
    agree(flat(ours), flat(theirs))
