"""What contract 1 has left in users' files still loads and gives the same bits (fixtures/contract1)."""

import pickle
import sys
import warnings
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "fixtures" / "contract1"))

import contents
import pytest
import torch
from contents import CONSTANTS, PARAMETERS, PUBLIC
from lib.cases import assert_same
from torch.utils._pytree import tree_flatten

import quantkit
from quantkit import reference

pytestmark = pytest.mark.fallback
FOLDER = Path(contents.__file__).parent
PROGRAMS = sorted(path.stem for path in (FOLDER / "programs").glob("*.pt2"))
SCHEMAS = (FOLDER / "schemas.txt").read_text().splitlines()
LOADERS = {
    path.stem: lambda path=path: pickle.loads(path.read_bytes())
    for path in sorted((FOLDER / "parameters").glob("*.pickle"))
} | {
    f"torch.load, weights_only={only}": lambda only=only: torch.load(
        FOLDER / "parameters" / "saved.pt", weights_only=only
    )
    for only in (True, False)
}


def assert_same_results(actual, expected):
    """Of any nesting; also the limits and the dtype of QuantizationParams."""
    (actual, tree), (expected, expected_tree) = tree_flatten(actual), tree_flatten(expected)
    assert tree == expected_tree
    assert_same(tuple(actual), tuple(expected))


def by_the_reference(name, inputs):
    """What a program should return."""
    kind, _, operator = name.partition("-")
    if kind != "operator":
        return PUBLIC[kind](reference, *inputs)
    results = getattr(reference, f"{operator.lstrip('_')}_op")(*inputs, *CONSTANTS[operator])
    results = results if isinstance(results, tuple) else (results,)
    return results + tuple(torch.empty_like(r).copy_(r) for r in results)  # and in `out=` tensors


# ---- exported programs ----------------------------------------------------------------------------


@cache
def program(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(FOLDER / "programs" / f"{name}.pt2")


@cache
def cases(name):
    """Inputs and what the program returned for them, at two shapes."""
    return torch.load(FOLDER / "programs" / f"{name}.pt", weights_only=True)


def test_every_kind_of_program_is_here():
    operators = {f"operator-{name}" for name in CONSTANTS}
    assert set(PROGRAMS) == {*PUBLIC, *operators, "training-joint"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_returns_what_it_returned(name, backend):
    module = program(name).module()
    for inputs, expected in cases(name):
        assert_same_results(module(*inputs), expected)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_reference_returns_what_a_program_returned(name):
    for inputs, expected in cases(name):
        assert_same_results(by_the_reference(name, inputs), expected)


def test_programs_hold_every_overload():
    called = {str(n.target) for name in PROGRAMS for n in program(name).graph.nodes}
    assert called >= {
        f"quantkit.{name}.{overload}" for name in CONSTANTS for overload in ("default", "out")
    }


def test_a_loaded_program_can_be_differentiated(backend):
    """Its fake_quantize is the operator with the gradient."""
    for (x, qparams, grad), (y, expected) in cases("training"):
        x = x.clone().requires_grad_()
        found = program("fake_quantize").module()(x, qparams)
        assert_same(found.detach(), y)
        found.backward(grad)
        assert_same(x.grad, expected)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_a_package_made_of_a_program(tmp_path):
    """AOTInductor calls operators by the schemas that the program was exported with."""
    package = str(tmp_path / "package.pt2")
    torch._inductor.aoti_compile_and_package(program("quantize_dequantize"), package_path=package)
    module = torch._inductor.aoti_load_package(package)
    for inputs, expected in cases("quantize_dequantize"):
        assert_same_results(module(*inputs), expected)


# ---- pickled parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_pickled_parameters(load):
    parameters = load()
    assert parameters.keys() == PARAMETERS.keys()
    for name, fields in PARAMETERS.items():
        loaded = parameters[name]
        assert type(loaded) is quantkit.QuantizationParams
        for field, expected in fields.items():
            found = getattr(loaded, field)
            if isinstance(expected, torch.Tensor):
                assert_same(found, expected)
            else:
                assert (type(found), found) == (type(expected), expected), f"{name}: {field}"


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_pickled_parameters_are_taken(load):
    x = torch.arange(-6, 6).view(3, 4) / 2
    for name, qparams in load().items():
        made = quantkit.QuantizationParams(**PARAMETERS[name])
        q = quantkit.quantize_tensor(x, qparams)
        assert_same(q, reference.quantize_tensor(x, made))
        x_hat = quantkit.dequantize_tensor(q, qparams)
        assert_same(x_hat, reference.dequantize_tensor(q, made))


# ---- schemas --------------------------------------------------------------------------------------


def test_every_schema_is_registered_as_it_was():
    registered = [str(schema) for schema in torch._C._jit_get_all_schemas()]
    assert set(SCHEMAS) <= set(registered)
    assert len(SCHEMAS) == 2 * len(CONSTANTS)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda text: text.partition("(")[0])
def test_the_overload_of_a_schema(schema):
    name, _, overload = schema.partition("(")[0].removeprefix("quantkit::").partition(".")
    operator = getattr(torch.ops.quantkit, name)
    assert str(getattr(operator, overload or "default")._schema) == schema
