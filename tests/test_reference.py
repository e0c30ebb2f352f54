"""The definition against independent oracles: known answers, quant_tool, numpy."""

import itertools
import json
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from lib import oracle
from lib.backends import daily
from lib.cases import (
    CODES,
    FLOATS,
    GRANULARITIES,
    assert_same,
    given,
    parameter_shape,
    params,
    values,
)

import quantkit
from benchmarks import quant_tool
from quantkit import reference

pytestmark = pytest.mark.fallback
GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "quant_tool_3x3.json").read_text(), parse_float=Decimal
)


def assert_printed(tensor, table):
    """Every value of tensor rounds to the decimal in table."""
    flat = tensor.flatten().tolist()
    numbers = [Decimal(n) for n in _flatten(table)]
    assert len(flat) == len(numbers)
    for value, number in zip(flat, numbers, strict=True):
        # A printed 1.544 stands for 1.5440: four decimals unless more are given.
        digits = min(number.as_tuple().exponent, -4)
        step = Decimal(1).scaleb(digits)
        assert Decimal(value).quantize(step) == number.quantize(step)


def _flatten(table):
    if isinstance(table, list):
        for item in table:
            yield from _flatten(item)
    else:
        yield table


@pytest.mark.parametrize("module", [quantkit, reference, quant_tool], ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda c: f"sym={c['sym']}-{c['per_channel']}"
)
def test_known_answers(module, case):
    torch.manual_seed(0)
    x = torch.randn(3, 3)
    assert_printed(x, GOLDEN["input"]["values"])
    q, x_hat, qparams = module.quantize_dequant(
        x, case["per_channel"], case.get("channel_dim", 0), sym=case["sym"]
    )
    assert (qparams.q_min, qparams.q_max) == (GOLDEN["q_min"], GOLDEN["q_max"])
    assert q.tolist() == case["q"]
    assert_printed(qparams.scale, case["scale"])
    assert_printed(qparams.zero_point, case["zero_point"])
    assert_printed(x_hat, case["x_hat"])
    if "error" in case:
        for value, number in zip(
            (x_hat - x).flatten().tolist(), _flatten(case["error"]), strict=True
        ):
            number = Decimal(number)
            digits = number.as_tuple().exponent
            assert Decimal(value).quantize(Decimal(1).scaleb(max(digits, -11))) == number


@pytest.mark.parametrize("module", [quantkit, reference], ids=lambda m: m.__name__)
@pytest.mark.parametrize("sym", [True, False])
def test_agrees_with_quant_tool(module, sym):
    for shape, dtype in itertools.product([(5,), (6, 9), (3, 4, 5), (2, 3, 3, 3)], FLOATS):
        for seed, per_channel in itertools.product(range(4), [False, True]):
            x = values(shape, dtype, seed)
            for channel_dim in range(len(shape)) if per_channel and len(shape) > 1 else [0]:
                if per_channel and len(shape) == 1:
                    continue  # a vector has one scale of shape (1,): its own test
                args = (x, per_channel, channel_dim)
                q, x_hat, p = module.quantize_dequant(*args, sym=sym)
                q_, x_hat_, p_ = quant_tool.quantize_dequant(*args, sym=sym)
                assert torch.equal(q, q_)
                assert torch.equal(x_hat, x_hat_) and x_hat.dtype == x_hat_.dtype
                for a, b in zip(params(p), params(p_), strict=True):
                    assert torch.equal(a, b) and a.dtype == b.dtype and a.shape == b.shape


@pytest.mark.parametrize("dtype", daily(FLOATS, torch.float32, torch.float16), ids=str)
def test_choosing_agrees_with_numpy(dtype):
    for (shape, every), (low, high) in itertools.product(
        GRANULARITIES, [(-128, 127), (0, 255), (-7, 7), (0, 0), (-128, 255), (-32768, 32767)]
    ):
        for blocks, symmetric, zero in itertools.product(every, [True, False], [False, True]):
            if symmetric and zero:
                continue
            for special in (False, True):
                x = values(shape, dtype, low & 15, special) + (5 if zero else 0)
                args = (x, blocks, low, high, 1e-8, symmetric, zero)
                assert_same(reference.choose_qparams_op(*args), oracle.choose(*args))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize_agrees_with_numpy_for_mixed_dtypes(dtype):
    """Each parameter's dtype and rank decide the dtype of its step."""
    shape = (4, 6)
    x = values(shape, dtype, 3, special=True)
    shapes = [None, [2, 3], [1, -1]]
    for s_dtype, z_dtype, s_blocks, z_blocks in itertools.product(FLOATS, FLOATS, shapes, shapes):
        scale = next(given(shape, s_blocks, s_dtype, 1)).reshape(parameter_shape(shape, s_blocks))
        zero_point = list(given(shape, z_blocks, z_dtype, 2, integral=False))[1]
        if scale.dim() and zero_point.dim() and scale.shape[0] != zero_point.shape[0]:
            continue
        for code, (low, high) in CODES.items():
            args = (x, scale, zero_point, low, high, code)
            assert_same(reference.quantize_op(*args), oracle.quantize(*args))
        q = reference.quantize_op(x, scale, zero_point, -128, 127, torch.int8)
        assert_same(
            reference.dequantize_op(q, scale, zero_point), oracle.dequantize(q, scale, zero_point)
        )


def test_a_scalar_tensor_promotes_as_torch_does():
    for dtype, s_dtype, z_dtype in itertools.product(FLOATS, FLOATS, FLOATS):
        x, s = torch.tensor(1.37).to(dtype), torch.tensor(0.0231).to(s_dtype)
        z = torch.tensor(3.3).to(z_dtype)
        args = (x, s, z, -128, 127, torch.int8)
        assert_same(reference.quantize_op(*args), oracle.quantize(*args))
        q = torch.tensor(57, dtype=torch.int8)
        assert_same(reference.dequantize_op(q, s, z), oracle.dequantize(q, s, z))
