"""torch's own operators and observers. torch.quantize_per_tensor is FBGEMM's on x86."""

import importlib
import platform
import re

import pytest
import torch
from lib.rivals import COLUMNS, DTYPES, PAGE, chosen, given, same

import quantkit
from quantkit import QuantizationParams

importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers quantized_decomposed
DECOMPOSED = torch.ops.quantized_decomposed
LIMITS = {torch.int8: (-128, 127), torch.uint8: (0, 255)}
QUANTIZED = {torch.int8: torch.qint8, torch.uint8: torch.quint8}
x86 = pytest.mark.skipif(
    platform.machine() != "x86_64" or not hasattr(torch, "quantize_per_tensor"),
    reason="FBGEMM is for x86, and torch will remove the operators",
)


def parameters(g, dtype, round_first):
    return QuantizationParams(
        g.scale, g.zero_point, *LIMITS[dtype], dtype=dtype, compute_dtype=torch.float32,
        round_first=round_first,
    )  # fmt: skip


def multiplied(g, dtype, round_first):
    """The page's recipe "product", run as it stands there; z is an integer tensor with dimensions."""
    (call,) = re.findall(r"^\| \*\*product\*\* \| `(.+?)`", PAGE.read_text(), re.MULTILINE)
    call = call.replace("dtype=…", f"dtype={dtype}, round_first={round_first}", 1)
    assert g.zero_point.dim() == 2 and not g.zero_point.is_floating_point()
    names = {
        "x": g.x, "s": g.scale, "z": g.zero_point, "P": QuantizationParams, "torch": torch,
        "quantize_tensor": quantkit.quantize_tensor,
    } | dict(zip(("q_min", "q_max"), LIMITS[dtype], strict=True))  # fmt: skip
    return eval(call, names)


def name(dtype):
    return str(dtype).removeprefix("torch.")


def each_row(function, g):
    rows = zip(g.x, g.scale.flatten().tolist(), g.zero_point.flatten().tolist(), strict=True)
    return torch.stack([function(*row) for row in rows])


@pytest.mark.parametrize("dtype", LIMITS, ids=name)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
def test_fake_quantize(x_dtype, dtype):
    limits = LIMITS[dtype]
    g = given(x_dtype, *limits)
    ours = quantkit.fake_quantize(g.x, parameters(g, dtype, True))
    what = f"{name(x_dtype)} → {name(dtype)} and back"
    theirs = each_row(lambda x, s, z: torch.fake_quantize_per_tensor_affine(x, s, z, *limits), g)
    row = "torch fake_quantize_per_tensor_affine"
    same("torch", row, what, theirs, ours)
    codes = multiplied(g, dtype, True)
    back = quantkit.dequantize_tensor(codes, parameters(g, dtype, True)).to(x_dtype)
    same("torch", row, f"{what}, x · (1 / scale)", theirs, back)
    # Quotients from 2^63 on become q_min there.
    x = g.x.clamp(-1e15, 1e15)
    vectors = g.scale.flatten(), g.zero_point.flatten()
    theirs = torch.fake_quantize_per_channel_affine(x, *vectors, 0, *limits)
    row = "torch fake_quantize_per_channel_affine"
    same("torch", row, what, theirs, ours)
    same("torch", row, f"{what}, x · (1 / scale)", theirs, back)
    huge = torch.fake_quantize_per_channel_affine(g.x, *vectors, 0, *limits)[:, 4]
    assert torch.equal(huge, ((limits[0] - g.zero_point) * g.scale).flatten().to(x_dtype))


@pytest.mark.parametrize("dtype", LIMITS, ids=name)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
def test_quantized_decomposed(x_dtype, dtype):
    limits = (*LIMITS[dtype], dtype)
    g = given(x_dtype, *LIMITS[dtype])
    ours = quantkit.quantize_tensor(g.x, parameters(g, dtype, True))
    what = f"{name(x_dtype)} → {name(dtype)}"
    row = "torch quantized_decomposed.quantize_per_tensor, _per_channel"
    vectors = g.scale.flatten(), g.zero_point.flatten()
    theirs = DECOMPOSED.quantize_per_channel(g.x, *vectors, 0, *limits)
    same("torch", row, f"{what}, channels", theirs, ours)
    same("torch", row, f"{what}, x · (1 / scale)", theirs, multiplied(g, dtype, True))
    theirs = each_row(lambda x, s, z: DECOMPOSED.quantize_per_tensor(x, s, z, *limits), g)
    same("torch", row, f"{what}, tensors", theirs, ours)

    ours = quantkit.quantize_tensor(g.x, parameters(g, dtype, False))
    row = "torch quantized_decomposed.quantize_per_token"
    theirs = DECOMPOSED.quantize_per_token(g.x, g.scale, g.zero_point, *limits)
    same("torch", row, f"{what}, tokens", theirs, ours)
    same("torch", row, f"{what}, x · (1 / scale)", theirs, multiplied(g, dtype, False))
    back = DECOMPOSED.dequantize_per_token(theirs, g.scale, g.zero_point, *limits, torch.float32)
    x_hat = quantkit.dequantize_tensor(theirs, parameters(g, dtype, False))
    same("torch", "torch dequantize", f"{name(dtype)}, tokens", back, x_hat)
    back = DECOMPOSED.dequantize_per_channel(theirs, *vectors, 0, *limits)
    same("torch", "torch dequantize", f"{name(dtype)}, channels", back, x_hat)


@x86
@pytest.mark.parametrize("dtype", LIMITS, ids=name)
def test_quantize_per_tensor_and_channel(dtype):
    g = given(torch.float32, *LIMITS[dtype])
    ours = quantkit.quantize_tensor(g.x, parameters(g, dtype, False))
    kind = QUANTIZED[dtype]
    theirs = each_row(lambda x, s, z: torch.quantize_per_tensor(x, s, z, kind).int_repr(), g)
    row = "torch quantize_per_tensor (FBGEMM)"
    same("torch", row, f"float32 → {name(dtype)}", theirs, ours)
    # The fused product is exact in float64; that of x · (1 / scale) + zero_point is rounded once more.
    fused = (g.x.double() * (1.0 / g.scale).double() + g.zero_point).float()
    one = QuantizationParams(1.0, 0.0, *LIMITS[dtype], dtype=dtype)
    same(
        "torch", row, f"float32 → {name(dtype)}, fma", theirs, quantkit.quantize_tensor(fused, one)
    )
    vectors = g.scale.flatten().double(), g.zero_point.flatten().long()
    theirs = torch.quantize_per_channel(g.x, *vectors, 0, kind)
    row = "torch quantize_per_channel"
    same("torch", row, f"float32 → {name(dtype)}", theirs.int_repr(), ours)
    codes = multiplied(g, dtype, False)
    same("torch", row, f"float32 → {name(dtype)}, x · (1 / scale)", theirs.int_repr(), codes)
    back = quantkit.dequantize_tensor(theirs.int_repr(), parameters(g, dtype, False))
    same("torch", "torch dequantize", f"{kind}", theirs.dequantize(), back)


@x86
def test_codes_of_nan():
    """The table of the page, by which instruction set or another: the limits, or 0."""
    x, ones, zeros = torch.full((2, 64), torch.nan), torch.ones(2), torch.zeros(2)
    for dtype, (low, high) in LIMITS.items():
        kind = QUANTIZED[dtype]
        q = torch.quantize_per_tensor(x, 1.0, 0, kind).int_repr()
        assert set(q.unique().tolist()) <= {low, high}
        for q in (
            torch.quantize_per_channel(x, ones.double(), zeros.long(), 0, kind).int_repr(),
            DECOMPOSED.quantize_per_tensor(x, 1.0, 0, low, high, dtype),
        ):
            assert set(q.unique().tolist()) <= {low, 0}
        for y in (
            torch.fake_quantize_per_tensor_affine(x, 1.0, 0, low, high),
            torch.fake_quantize_per_channel_affine(x, ones, zeros.int(), 0, low, high),
        ):
            assert y.unique().tolist() == [low]


@x86
def test_scales_that_are_powers_of_two_hide_the_reciprocal():
    g = given(torch.float32, -128, 127)
    g = g._replace(x=g.x[::4], scale=g.scale[::4], zero_point=g.zero_point[::4])
    g = g._replace(
        x=g.x.repeat(4, 1), scale=g.scale.repeat(4, 1), zero_point=g.zero_point.repeat(4, 1)
    )
    vectors = g.scale.flatten(), g.zero_point.flatten()
    theirs = DECOMPOSED.quantize_per_channel(g.x, *vectors, 0, -128, 127, torch.int8)
    ours = quantkit.quantize_tensor(g.x, parameters(g, torch.int8, True))
    row = "torch quantized_decomposed.quantize_per_tensor, _per_channel"
    same("torch", row, "float32 → int8, scales 2^k", theirs, ours)
    theirs = each_row(lambda x, s, z: torch.quantize_per_tensor(x, s, z, torch.qint8).int_repr(), g)
    ours = quantkit.quantize_tensor(g.x, parameters(g, torch.int8, False))
    same("torch", "torch quantize_per_tensor (FBGEMM)", "float32 → int8, scales 2^k", theirs, ours)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
@pytest.mark.parametrize(
    "symmetric, low, high", [(True, -128, 127), (True, -8, 7), (False, -128, 127), (False, 0, 255)]
)
def test_observers(symmetric, low, high, x_dtype):
    from torch.ao.quantization.observer import PerChannelMinMaxObserver

    x = chosen(x_dtype, (high - low) / 2)
    scheme = torch.per_channel_symmetric if symmetric else torch.per_channel_affine
    kind = torch.qint8 if low < 0 else torch.quint8
    observer = PerChannelMinMaxObserver(0, kind, scheme, quant_min=low, quant_max=high)
    observer(x)
    scale, zero_point = observer.calculate_qparams()
    options = {
        "eps": observer.eps.item(),
        "q_min": low,
        "q_max": high,
        "compute_dtype": torch.float32,
    }
    dtype = torch.int8 if low < 0 else torch.uint8
    if symmetric:
        p = quantkit.get_symmetric_qparams(x, True, 0, dtype, scale_rule="half_range", **options)
    else:
        p = quantkit.get_asymmetric_qparams(x, True, 0, dtype, include_zero=True, **options)
    row = f"torch observers, {'symmetric' if symmetric else 'affine'}"
    what = f"{name(x_dtype)} → [{low}, {high}]"
    same("torch", row, f"{what}, scale", scale.float(), p.scale.flatten())
    ours = p.zero_point.flatten()
    same("torch", row, f"{what}, zero point", zero_point.float() + 0.0, ours + 0.0)
    assert x.numel() == 512 * COLUMNS
