"""Every argument of every operator and function fuzzed: an error that names it, nothing written."""

import dataclasses
import functools
import inspect
from pathlib import Path

import pytest
import torch
from lib.bad import (
    BAD,
    CHOOSING,
    DIVIDING,
    FIELDS,
    FUNCTIONS,
    MODULES,
    NUMBERS,
    QPARAMS,
    SCALE,
    SEED,
    SINGLE,
    TENSORS,
    ZERO,
    X,
    arguments_of,
    bad_of,
    described,
    of_operators,
    outs_of,
    refused,
    without,
)
from lib.cases import assert_same, ops
from torch._subclasses.fake_tensor import FakeTensorMode

from quantkit import QuantizationParams, _checks, _load, reference
from quantkit.operators import OPERATORS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.fallback,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]

EVERY_OPERATOR = pytest.mark.parametrize("name", OPERATORS)


@EVERY_OPERATOR
def test_each_argument_of_each_operator(name):
    operator = getattr(ops, name)
    for argument in arguments_of(name):
        names = (argument, "ScalarType") if argument == "dtype" else (argument,)  # torch's word
        for label, b in bad_of(name, argument).items():
            if (name, label) == ("_masked_gradient", "double"):
                continue  # a mask has no dtype that a gradient must have
            arguments, outs = arguments_of(name) | {argument: b.make()}, outs_of(name)
            tensors = [*arguments.values(), *outs.values()]
            with described(argument, label):
                refused(of_operators(b), names, functools.partial(operator, **arguments), tensors)
                call = functools.partial(operator.out, **arguments, **outs)
                refused(of_operators(b), names, call, tensors)


@pytest.mark.skipif(_load.extension is None, reason="torch crashes where it makes a dtype of them")
@pytest.mark.parametrize("number", [3, 44, -1, 99, 1000])
def test_numbers_of_other_dtypes_or_of_none(number, name="quantize"):
    arguments, outs = arguments_of(name) | {"dtype": number}, outs_of(name)
    operator, tensors = getattr(ops, name), [*arguments_of(name).values(), *outs.values()]
    for call in (lambda: operator(**arguments), lambda: operator.out(**arguments, **outs)):
        refused((RuntimeError,), ("dtype", "ScalarType"), call, tensors)


@EVERY_OPERATOR
def test_limits_and_flags_that_exclude_each_other(name):
    arguments = arguments_of(name)
    cases = [{"q_min": 5, "q_max": 4}, {"q_min": 2**63 - 1, "q_max": -(2**63)}]
    cases += [{"q_max": 128, "dtype": torch.int8}, {"q_min": -1, "dtype": torch.uint8}]
    cases += [{"symmetric": True, "include_zero": True}, {"round_first": True, "seed": SEED}]
    cases += [{"index": [0, 6, 1], "seed": None}]
    for case in cases:
        if case.keys() <= arguments.keys():
            call = arguments | case
            for tensors, run in (
                ({}, getattr(ops, name).default),
                (outs_of(name), getattr(ops, name).out),
            ):
                refused(
                    (RuntimeError,), case, lambda c=call, t=tensors, r=run: r(**c, **t),
                    [*call.values(), *tensors.values()],
                )  # fmt: skip


@EVERY_OPERATOR
def test_calls_that_do_not_fit_the_schema(name):
    arguments, outs = arguments_of(name), outs_of(name)
    operator, base = getattr(ops, name), name.partition(".")[0]
    tensors = [*arguments.values(), *outs.values()]
    first, last_out = next(iter(arguments)), list(outs)[-1]
    calls = {
        first: lambda: operator.out(**outs),
        last_out: lambda: operator.out(**arguments, **without(outs, last_out)),
        "foreign": lambda: operator.default(**arguments, foreign=1),
        base: lambda: operator.out(*arguments.values(), *outs.values()),
    }
    for named, call in calls.items():
        refused((RuntimeError,), (named, base), call, tensors)


@EVERY_OPERATOR
def test_meta_tensors_beside_real_ones(name):
    tensors = [k for k, v in arguments_of(name).items() if isinstance(v, torch.Tensor)]
    for argument in tensors:
        arguments, outs = arguments_of(name), outs_of(name)
        arguments[argument] = arguments[argument].to("meta")
        operator = getattr(ops, name)
        everything = [*arguments.values(), *outs.values()]
        if {*tensors} > {argument, "seed"}:  # which may be on the CPU beside x on a device
            refused(
                (RuntimeError,), (argument,), lambda o=operator, a=arguments: o(**a), everything
            )
        refused(
            (RuntimeError,), (argument, *outs),
            lambda o=operator, a=arguments, t=outs: o.out(**a, **t), everything,
        )  # fmt: skip


@EVERY_OPERATOR
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


@pytest.mark.parametrize("name", [n for n in OPERATORS if not n.startswith("_")])
def test_meta_tensors_are_refused_as_real_ones_are(name):
    """Where all tensors are meta the checks are those of the fake kernels."""
    operator = getattr(ops, name)
    cases = {"q_min": 128, "block_size": [0, 1], "eps": 0.0, "dtype": torch.int32}
    cases |= {"scale": torch.ones(3, 1), "zero_point": torch.ones(4, 6, dtype=torch.complex64)}
    cases |= {"x": X.to(torch.complex64), "q": X.to(torch.complex64), "format": "int9"}
    for argument in cases.keys() & arguments_of(name).keys():
        real = arguments_of(name) | {argument: cases[argument]}
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in real.items()}
        with pytest.raises(Exception) as caught:
            operator(**real)
        with pytest.raises(Exception) as caught_on_meta:
            operator(**meta)
        assert repr(caught_on_meta.value) == repr(caught.value)


@EVERY_OPERATOR
def test_lazily_negated_tensors_change_no_refusal(name):
    """Torch hands such calls to a kernel in Python first."""
    operator = getattr(ops, name)
    first = next(iter(arguments_of(name)))
    arguments = arguments_of(name) | {first: torch.complex(X, X).conj().imag}
    tensors = [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and k != first]
    for argument in tensors:
        if argument == "zero_point" and (".format" in name or name in SINGLE):
            continue  # None is 0
        if argument in ("seed", "bias"):
            continue  # None rounds to nearest, and there may be none
        call = arguments | {argument: None}
        refused((RuntimeError,), (argument,), lambda c=call: operator(**c), call.values())
    for result, out in outs_of(name).items():
        for wrong in (None, out[:1], out.to(torch.int32)):
            outs = outs_of(name) | {result: wrong}
            refused(
                (RuntimeError,), (result,),
                lambda t=outs: operator.out(**arguments, **t),
                [*arguments.values(), *outs.values()],
            )  # fmt: skip


# ---- out= -----------------------------------------------------------------------------------------

RESULTS = [(name, result) for name, (_, results, *_) in OPERATORS.items() for result in results]
EVERY_RESULT = pytest.mark.parametrize(("name", "result"), RESULTS)


def put(name, result, out):
    """The operator refuses out in the place of a result, and leaves all tensors alone."""
    arguments, outs = arguments_of(name), outs_of(name) | {result: out}

    def check(*kinds):
        tensors = [*arguments.values(), *outs.values()]
        refused(kinds, (result,), lambda: getattr(ops, name).out(**arguments, **outs), tensors)

    return check


@EVERY_RESULT
def test_what_is_no_output(name, result):
    for label in (*TENSORS, *NUMBERS):
        with described(result, label):
            put(name, result, BAD["x"][label].make())(RuntimeError, NotImplementedError)


@EVERY_RESULT
def test_outputs_of_another_dtype_shape_or_device(name, result):
    right = outs_of(name)[result]
    shape = tuple(right.shape)
    for dtype in set(_checks.REAL_DTYPES) - {right.dtype}:
        put(name, result, torch.full(shape, 1, dtype=dtype))(RuntimeError)
    wrong = {(), (1,), shape[::-1], (1, *shape), (*shape, 1), (0, *shape[1:]), (shape[0],), (1, 1)}
    wrong |= {(shape[0] + 1, *shape[1:]), (shape[0] - 1, *shape[1:]), (1, *shape[1:])}
    for other in wrong - {shape}:
        put(name, result, torch.ones(other, dtype=right.dtype))(RuntimeError)
    put(name, result, right.to("meta"))(RuntimeError)


@EVERY_RESULT
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


@EVERY_OPERATOR
def test_outputs_in_the_memory_of_another_tensor(name):
    for result, other in pairs_in_one_memory(name):
        with described(result, other):
            check_in_one_memory(name, result, other)


def check_in_one_memory(name, result, other):
    arguments, outs = arguments_of(name), outs_of(name)
    among = outs if other in outs and other not in arguments else arguments
    length = among[other].numel() * among[other].element_size()
    size = outs[result].numel() * outs[result].element_size()
    for shift in {0, 8, -8, length - 8, 8 - size} - ({0} if "fake_quantize" in name else set()):
        memory = torch.full((4096,), 77, dtype=torch.uint8)
        home = among[other]
        placed = at(memory, home, 2048).copy_(home)
        shared = outs | {result: at(memory, outs[result], 2048 + shift)}
        given = dict(arguments)
        (shared if among is outs else given)[other] = placed
        refused(
            (RuntimeError,), (rf"{result}: overlaps {other}",),
            lambda g=given, t=shared: getattr(ops, name).out(**g, **t),
            [memory, *given.values(), *shared.values()],
        )  # fmt: skip


@EVERY_RESULT
def test_outputs_that_overlap_themselves(name, result):
    right = outs_of(name)[result]
    memory = torch.full((100,), 77, dtype=right.dtype)
    strides = [(0, 1), (6, 0), (0, 0), (1, 1), (5, 1), (2, 3), (1, 2)]
    rest = right.stride()[2:]
    for rows, columns in strides if right.shape[1] > 1 else strides[:1]:
        put(name, result, memory.as_strided(right.shape, (rows, columns, *rest)))(RuntimeError)
    put(name, result, memory[: right.shape[1]].expand(right.shape))(RuntimeError)


@pytest.mark.skipif(_load.extension is None, reason="torch's own operators crash on such tensors")
def test_tensors_whose_memory_was_given_back(torch_process):
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
    done = torch_process.run(program, ROOT)
    assert done.returncode == 0, done.returncode
    each = [[name] * 3 + ["taken"] for name in ("x", "scale", "zero_point", "out")]
    assert done.stdout.splitlines() == [line for lines in each for line in lines * 3]


# ---- the functions --------------------------------------------------------------------------------


def bad_arguments(function):
    """(argument of a function or field of its qparams, label of what is bad)."""
    for argument in inspect.signature(getattr(reference, function)).parameters:
        if argument == "options":
            continue  # those of dynamic_quantize
        if argument == "qparams":
            yield from ((argument, label) for label in QPARAMS)
            limits = set() if function.startswith("dequantize") else {"q_min", "q_max", "dtype"}
            steps = {"block_size", "global_scale", "compute_dtype", "round_first"}
            for field in {"scale", "zero_point", *steps, *limits}:
                yield from ((field, label) for label in FIELDS[field])
        else:
            table = CHOOSING["x" if argument == "q" else argument]
            if function == "aminmax" and argument == "block_size":
                table = without(table, *DIVIDING)  # a last block may be short
            yield from ((argument, label) for label in table)


def bad_call(function, argument, label):
    """(what is raised, the arguments) of a call of which one thing is bad."""
    first, *others = inspect.signature(getattr(reference, function)).parameters
    table = CHOOSING | {"q": CHOOSING["x"], "qparams": QPARAMS}
    qparams = QuantizationParams(SCALE, ZERO, -128, 127, dtype=torch.int8)
    valid = {first: X} | ({"qparams": qparams} if "qparams" in others else {})
    valid |= {"scheme": "int8_token"} if "scheme" in others else {}
    if argument in FIELDS and "qparams" in others:
        b = FIELDS[argument][label]
        return b.kind, valid | {"qparams": dataclasses.replace(qparams, **{argument: b.make()})}
    b = table[argument][label]
    beside = {"channel_dim": {"per_channel": True}, "index": {"seed": 1}}.get(argument, {})
    return b.kind, valid | beside | {argument: b.make()}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_argument_of_each_function(function, module):
    call = getattr(MODULES[module], function)
    for argument, label in bad_arguments(function):
        kind, arguments = bad_call(function, argument, label)
        qparams = arguments.get("qparams")
        fields = getattr(qparams, "scale", 0), getattr(qparams, "zero_point", 0)
        tensors = [*arguments.values(), *fields]
        with described(argument, label):
            refused((kind,), (argument,), functools.partial(call, **arguments), tensors)


@pytest.mark.parametrize("module", MODULES)
def test_numbers_beyond_64_bits_are_numbers(module):
    module = MODULES[module]
    p = module.get_symmetric_qparams(X, eps=2**70)
    assert_same(p.scale, torch.tensor(2.0**70))
    q = module.quantize_tensor(X, QuantizationParams(2**70, -(2**70), -128, 127))
    assert (q == -128).all()
