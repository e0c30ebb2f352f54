"""optimum-quanto: symmetric int8 and float8, affine int4 with a float shift and with a zero point."""

import pytest
import torch
from lib.rivals import COLUMNS, DTYPES, ROWS, chosen, given, needs, same

import quantkit
from quantkit import QuantizationParams
from quantkit.formats import OF_NAME

needs("optimum-quanto", "optimum.quanto")
from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qfloat8_e4m3fn, qint4, qint8  # noqa: E402

PEER = "optimum-quanto"
F32 = torch.float32


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [qint8, qfloat8_e4m3fn], ids=["int8", "float8"])
def test_symmetric(kind, x_dtype):
    floating = kind.dtype.is_floating_point
    x = chosen(x_dtype, 14.0 if floating else 127.0)
    scale = AbsmaxOptimizer()(x, kind, 0)
    q = torch.ops.quanto.quantize_symmetric(x, kind.dtype, 0, scale)
    row = f"optimum-quanto {'qfloat8_e4m3fn' if floating else 'qint8'}"
    of = str(x_dtype).removeprefix("torch.")
    # Without further keywords int8 takes version 1's steps, which are in x's dtype as theirs.
    p = quantkit.get_symmetric_qparams(x, True, dtype=kind.dtype, eps=1e-30)
    same(PEER, row, f"{of}, scale", scale.float(), p.scale.float())
    p.scale = scale
    same(PEER, row, f"{of}, codes", q, quantkit.quantize_tensor(x, p))


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeropoint", [False, True])
def test_affine(zeropoint, x_dtype):
    x = chosen(x_dtype, 7.5, 128)
    f = OF_NAME["uint4"]
    groups = x.view(-1, 128)
    scale, shift = MaxOptimizer()(x, qint4, 0, 128, zeropoint)
    q = torch.ops.quanto.quantize_affine(x, 4, 0, 128, scale, shift)
    q = q.view(ROWS, COLUMNS) if q.shape[0] == groups.shape[0] else q.t().reshape(ROWS, COLUMNS)
    scale, shift = (t.reshape(ROWS, -1) for t in (scale, shift))
    row = "optimum-quanto qint4, " + ("zero point" if zeropoint else "float shift")
    of = str(x_dtype).removeprefix("torch.")
    blocks = (1, 128)
    chosen_p = quantkit.get_asymmetric_qparams(
        x, dtype=torch.uint8, q_max=15, block_size=blocks, eps=1e-30
    )
    same(PEER, row, f"{of}, scale", scale.float(), chosen_p.scale.float())
    p = QuantizationParams(scale, 0.0, 0, 15, dtype=f.dtype, block_size=blocks, round_first=True)
    if zeropoint:
        theirs, ours = shift.float(), chosen_p.zero_point.float()
        same(PEER, row, f"{of}, zero point", theirs, ours + 0.0)
        p.zero_point = shift.float()
        ours = quantkit.quantize_tensor(x, p)
    else:
        moved = (x.view(ROWS, -1, 128) + shift.unsqueeze(2)).view(x.shape)
        ours = quantkit.quantize_tensor(moved, p)
        # Version 1's steps divide in bfloat16, as theirs. They have no packed codes.
        plain = QuantizationParams(scale, 0.0, 0, 15, dtype=torch.uint8, block_size=blocks)
        same(
            PEER, row, f"{of}, codes, dtype=torch.uint8", q, quantkit.quantize_tensor(moved, plain)
        )
    same(PEER, row, f"{of}, codes", q, f.unpack(ours))


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_given_scales(x_dtype):
    """Beyond the limits too, with infinities and signed zeros."""
    g = given(x_dtype, -128, 127, zero_points=False)
    scale = g.scale.to(x_dtype)
    q = torch.ops.quanto.quantize_symmetric(g.x, torch.int8, 0, scale)
    ours = quantkit.quantize_tensor(g.x, QuantizationParams(scale, 0.0, -128, 127))
    same(PEER, "optimum-quanto qint8", f"{str(x_dtype)[6:]}, given scales", q, ours)
