"""Calls with several random arguments, bad ones too: the reference's result, or an error."""

import copy
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lib.bad import (
    BAD,
    CHOOSING,
    FIELDS,
    FUNCTIONS,
    MODULES,
    SCALE,
    SEED,
    ZERO,
    X,
    arguments_of,
    outs_of,
    refused,
    state_of,
)
from lib.cases import assert_same, ops

import quantkit
from quantkit import QuantizationParams, _load, reference
from quantkit.formats import OF_NAME
from quantkit.operators import OPERATORS

pytestmark = [
    pytest.mark.fallback,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]

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
    "dtype": [lambda v=v: v for v in (torch.int8, torch.uint8, torch.int16, torch.float8_e5m2)],
    "format": [lambda v=v: v for v in (*OF_NAME, "int8", "int4", "float8_e4m3fn")],
    "rule": [lambda v=v: v for v in (None, "half_range")],
    "steps": [lambda v=v: v for v in (None, torch.float32)],
    "scheme": [lambda v=v: v for v in (*quantkit.SCHEMES, {"block_size": (2,)})],
    "whole": [lambda: None],
    "seed": [lambda: None, lambda: SEED, lambda: torch.tensor([-1, 9, 2**62])[::2]],
    "pair": [lambda v=v: v for v in (None, 3, -1, True, (1, 2), [2**62, -5])],
    "places": [
        lambda v=v: v
        for v in (None, [0, 6, 1], (9, -1, 2), [2**62, 2**60, 0], [0], [True, 0, 1])
    ],
}  # fmt: skip
KIND_OF = dict.fromkeys(("q_min", "q_max"), "int") | {"eps": "float", "block_size": "sizes"}
KIND_OF |= dict.fromkeys(("symmetric", "include_zero", "sym", "per_channel"), "flag")
KIND_OF |= {"dtype": "dtype", "channel_dim": "int", "format": "format", "scheme": "scheme"}
KIND_OF |= dict.fromkeys(("scale_dtype", "compute_dtype", "output_dtype"), "steps")
KIND_OF |= {"global_scale": "whole", "seed": "seed", "index": "places"}
KIND_OF |= {"scale_rule": "rule", "round_first": "flag"}


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
def operator_calls(draw):
    """An operator, with one to three of its arguments or outputs replaced by anything."""
    name = draw(st.sampled_from(list(OPERATORS)))
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


@given(operator_calls())
@settings(max_examples=100, deadline=None, print_blob=True)
def test_operators_do_as_the_reference_or_raise(call):
    name, arguments, outs = call
    function = OPERATORS[name].reference
    operator = getattr(ops, name)
    fits = all(isinstance(v, int) for k, v in arguments.items() if KIND_OF.get(k) == "flag")
    if fits:  # else the schema refuses it, which the reference's function does not have
        agree(outcome(lambda: operator(**arguments)), outcome(lambda: function(**arguments)))
    if not fits or not plain((*arguments.values(), *outs.values())):
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
def function_calls(draw):
    """A function, with one to three of its arguments, or of the fields of qparams, replaced."""
    function = draw(st.sampled_from(FUNCTIONS))
    first, *others = inspect.signature(getattr(reference, function)).parameters
    table = CHOOSING | {"q": CHOOSING["x"]}
    takes_parameters, others = "qparams" in others, [a for a in others if a != "options"]
    if takes_parameters:
        others, table = list(FIELDS), table | FIELDS
    chosen = st.lists(st.sampled_from([first, *others]), min_size=1, max_size=3, unique=True)
    values = {first: X} | ({"scheme": "int8_token"} if "scheme" in others else {})
    for argument in draw(chosen):
        makers = WEIRD["pair" if argument == "seed" else KIND_OF.get(argument, "tensor")]
        if draw(st.booleans()):
            makers = [b.make for b in table[argument].values()]
        values[argument] = draw(st.sampled_from(makers))()
    count = len(values) - (values[first] is X) - ("scheme" in values)
    if not takes_parameters:
        return function, values, count
    fields = {"scale": SCALE, "zero_point": ZERO, "q_min": -128, "q_max": 127} | values
    del fields[first]
    return function, {first: values[first], "qparams": QuantizationParams(**fields)}, count


@given(function_calls())
@settings(max_examples=100, deadline=None, print_blob=True)
def test_functions_do_as_the_reference_or_raise(call):
    function, arguments, count = call
    ours, theirs = (
        outcome(lambda m=m: getattr(m, function)(**arguments)) for m in MODULES.values()
    )
    if isinstance(ours, Exception) and isinstance(theirs, Exception) and count == 1:
        assert repr(ours) == repr(theirs)
    agree(flat(ours), flat(theirs))
