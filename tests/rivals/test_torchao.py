"""torchao's affine integers and float8."""

import dataclasses
import logging

import pytest
import torch
from lib.rivals import COLUMNS, DTYPES, ROWS, chosen, given, needs, same

import quantkit
from quantkit import QuantizationParams
from quantkit.formats import OF_NAME

logging.getLogger("torchao").setLevel(logging.ERROR)
needs("torchao")
from torchao.quantization import quant_primitives as primitives  # noqa: E402

MAPPING = primitives.MappingType
F32 = torch.float32
INTEGERS = {  # row: (format, dtype of codes, limits, block, symmetric)
    "torchao int8, SYMMETRIC": ("int8", torch.int8, (-128, 127), COLUMNS, True),
    "torchao int4, SYMMETRIC, groups": ("int4", torch.int8, (-8, 7), 128, True),
    "torchao uint8, ASYMMETRIC": ("uint8", torch.uint8, (0, 255), COLUMNS, False),
    "torchao uint4, ASYMMETRIC, groups": ("uint4", torch.uint8, (0, 15), 128, False),
}


def unpacked(codes, format):
    """One code in each element: the peer has no packed tensor here."""
    return OF_NAME[format].unpack(codes).view(torch.uint8)


def same_codes(row, part, theirs, ours, format):
    theirs = theirs.view(torch.uint8) & (15 if format.endswith("int4") else 255)
    same("torchao", row, part, theirs, unpacked(ours, format))


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", INTEGERS)
def test_integers(row, x_dtype):
    format, dtype, limits, block, symmetric = INTEGERS[row]
    x = chosen(x_dtype, (limits[1] - limits[0]) / 2, block)
    blocks = (1, block)
    mapping = MAPPING.SYMMETRIC if symmetric else MAPPING.ASYMMETRIC
    scale, zero_point = primitives.choose_qparams_affine(
        x, mapping, blocks, dtype, *limits, 1e-8, F32, torch.int32
    )
    q = primitives.quantize_affine(x, blocks, scale, zero_point, dtype, *limits)
    shape = (ROWS, COLUMNS // block)
    scale, zero_point = scale.view(shape), zero_point.view(shape)
    options = {"block_size": blocks, "eps": 1e-8}
    half = x_dtype == torch.bfloat16
    if symmetric:
        p = quantkit.get_symmetric_qparams(x, dtype=format, scale_rule="half_range", **options)
    elif half:  # version 1's steps, in bfloat16 as theirs
        options |= {"q_min": limits[0], "q_max": limits[1], "include_zero": True}
        p = quantkit.get_asymmetric_qparams(x, dtype=dtype, **options)
    else:
        p = quantkit.get_asymmetric_qparams(x, dtype=format, include_zero=True, **options)
    of = str(x_dtype).removeprefix("torch.")
    same("torchao", row, f"{of}, scale", scale, p.scale.float())
    same("torchao", row, f"{of}, zero point", zero_point.float(), p.zero_point.float())
    p = QuantizationParams(
        scale, zero_point, *limits, dtype=OF_NAME[format].dtype, block_size=blocks,
        compute_dtype=F32, round_first=True,
    )  # fmt: skip
    same_codes(row, f"{of}, codes", q, quantkit.quantize_tensor(x, p), format)
    # The two-step call of the page.
    one = dataclasses.replace(p, scale=torch.ones_like(scale))
    v = (x.view(*shape, block) * (1.0 / scale.unsqueeze(2))).view(x.shape)
    ours = quantkit.quantize_tensor(v, one)
    same_codes(row, f"{of}, codes, x · (1 / scale)", q, ours, format)
    back = primitives.dequantize_affine(
        q, blocks, scale, zero_point, dtype, *limits, output_dtype=F32
    )
    same("torchao", row, f"{of}, back", back, quantkit.dequantize_tensor(ours, p))


def test_no_clipping_error():
    """The scale is the larger of min / q_min and max / q_max: that of max |x| where max is larger."""
    row = "torchao int8, SYMMETRIC_NO_CLIPPING_ERR"
    x = chosen(F32, 127.0)
    for values, what in ((x, "scale"), (x.abs(), "scale of no negative numbers")):
        scale, _ = primitives.choose_qparams_affine(
            values, MAPPING.SYMMETRIC_NO_CLIPPING_ERR, (1, COLUMNS), torch.int8, -128, 127, 1e-8,
            F32, torch.int32,
        )  # fmt: skip
        p = quantkit.get_symmetric_qparams(values, True, eps=1e-8)
        same("torchao", row, f"float32, {what}", scale.view(-1, 1), p.scale)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("blocks", [(ROWS, COLUMNS), (1, COLUMNS), (1, 128), (128, 128)], ids=str)
def test_float8(x_dtype, dtype, blocks):
    largest = torch.finfo(dtype).max
    x = chosen(x_dtype, 14.0, blocks[1] if blocks[0] == 1 else 128) * (largest / 14)
    scale = primitives._choose_scale_float8(x, blocks, dtype)
    q = primitives._quantize_affine_float8(x, scale, dtype)
    p = quantkit.get_symmetric_qparams(x, dtype=dtype, block_size=blocks)
    of = f"{str(x_dtype)[6:]} → {str(dtype)[6:]}, {blocks[0]} × {blocks[1]}"
    row = "torchao float8"
    same("torchao", row, f"{of}, scale", scale, p.scale)
    p.scale = scale
    same("torchao", row, f"{of}, codes", q, quantkit.quantize_tensor(x, p))
    theirs = primitives._dequantize_affine_float8(q, scale, F32)
    same("torchao", row, f"{of}, back", theirs, quantkit.dequantize_tensor(q, p))


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_given_scales(x_dtype):
    """Beyond the limits too, with infinities, signed zeros and, in float8, NaN."""
    of = f"{str(x_dtype)[6:]}, given scales"
    g = given(x_dtype, -128, 127)
    row = "torchao int8, SYMMETRIC"
    limits = (torch.int8, -128, 127)
    q = primitives.quantize_affine(g.x, (1, COLUMNS), g.scale, g.zero_point, *limits)
    options = {"compute_dtype": F32, "round_first": True}
    p = QuantizationParams(g.scale, g.zero_point, -128, 127, **options)
    same("torchao", row, of, q, quantkit.quantize_tensor(g.x, p))
    p.scale = torch.ones(())
    same(
        "torchao",
        row,
        f"{of}, x · (1 / scale)",
        q,
        quantkit.quantize_tensor(g.x * (1.0 / g.scale), p),
    )
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        largest = int(torch.finfo(dtype).max)
        g = given(x_dtype, -largest, largest, zero_points=False, nan=True)
        q = primitives._quantize_affine_float8(g.x, g.scale, dtype)
        p = QuantizationParams(g.scale, 0.0, -largest, largest, dtype=dtype)
        # The sign of a NaN is kept there.
        q = torch.where(g.x.isnan(), q.view(torch.uint8) & 127, q.view(torch.uint8)).view(dtype)
        ours = quantkit.quantize_tensor(g.x, p)
        same("torchao", "torchao float8", f"{of}, {str(dtype)[6:]}", q, ours)
