"""What contract 1 has left in users' files still loads and gives the same bits (fixtures/contract1)."""

import pickle
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from lib.cases import assert_same
from torch.utils._pytree import tree_flatten

import quantkit
from quantkit import reference

pytestmark = pytest.mark.fallback
FOLDER = Path(__file__).parent / "fixtures" / "contract1"
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
# What the files of parameters hold.
PARAMETERS = {
    "int8, per tensor": {
        "scale": torch.tensor(0.0625),
        "zero_point": torch.tensor(0.0),
        "q_min": -128,
        "q_max": 127,
        "dtype": torch.int8,
    },
    "uint8, per channel": {
        "scale": torch.tensor([[0.1], [0.3], [7.0]]),
        "zero_point": torch.tensor([[128.0], [3.0], [0.0]]),
        "q_min": 0,
        "q_max": 255,
        "dtype": torch.uint8,
    },
    "int16, in blocks": {
        "scale": torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=torch.bfloat16),
        "zero_point": torch.tensor([[0, 1], [-2, 3], [-40, 50]], dtype=torch.int32),
        "q_min": -500,
        "q_max": 400,
        "dtype": torch.int16,
    },
    "no dtype, per channel": {
        "scale": torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64),
        "zero_point": torch.tensor([[0.0, 1.5, -2.0, 3.0]], dtype=torch.float64),
        "q_min": -8,
        "q_max": 7,
        "dtype": None,
    },
    "no dtype, numbers": {"scale": 0.1, "zero_point": 3, "q_min": 0, "q_max": 255, "dtype": None},
}


def assert_same_results(actual, expected):
    """Of any nesting; also the limits and the dtype of QuantizationParams."""
    (actual, tree), (expected, expected_tree) = tree_flatten(actual), tree_flatten(expected)
    assert tree == expected_tree
    assert_same(tuple(actual), tuple(expected))


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


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_returns_what_it_returned(name, backend):
    module = program(name).module()
    for inputs, expected in cases(name):
        assert_same_results(module(*inputs), expected)


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
    assert len(SCHEMAS) == 16
