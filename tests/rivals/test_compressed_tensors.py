"""compressed-tensors: int8, float8, and int4 in its pack-quantized layout."""

import pytest
import torch
from lib.rivals import COLUMNS, DTYPES, ROWS, chosen, given, needs, same

import quantkit
from quantkit import QuantizationParams

needs("compressed-tensors")
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize  # noqa: E402
from compressed_tensors.quantization.utils.helpers import calculate_qparams  # noqa: E402

PEER = "compressed-tensors"
F32 = torch.float32
CASES = {  # row: (format, args, block)
    "compressed-tensors int8, symmetric": ("int8", {"strategy": "channel"}, COLUMNS),
    "compressed-tensors int8, asymmetric": (
        "int8", {"strategy": "channel", "symmetric": False}, COLUMNS
    ),
    "compressed-tensors int4, pack-quantized": (
        "int4", {"strategy": "group", "group_size": 128, "num_bits": 4}, 128
    ),
    "compressed-tensors float8": ("float8_e4m3fn", {"strategy": "channel", "type": "float"}, COLUMNS),
}  # fmt: skip


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", CASES)
def test_chosen(row, x_dtype):
    format, options, block = CASES[row]
    args = QuantizationArgs(**({"num_bits": 8, "type": "int", "symmetric": True} | options))
    floating, half = format.startswith("float"), x_dtype == torch.bfloat16
    largest = {"int8": 127.5, "int4": 7.5}.get(format, 14.0)
    x = chosen(x_dtype, largest, block)
    blocks = x.view(ROWS, -1, block)
    scale, zero_point = calculate_qparams(blocks.amin(2), blocks.amax(2), args)
    zeros = None if floating else zero_point  # + 0 would make 0.0 of -0.0
    q = quantize(x, scale, zeros, args, dtype=torch.float8_e4m3fn if floating else torch.int8)

    # Only a scale of 0 becomes finfo(dtype).eps there.
    keywords = {"dtype": format, "block_size": (1, block), "eps": 1e-30}
    if not args.symmetric:
        p = quantkit.get_asymmetric_qparams(x, include_zero=True, compute_dtype=F32, **keywords)
        if half:  # version 1's steps
            p = quantkit.get_asymmetric_qparams(x, include_zero=True, **keywords)
    elif floating:
        p = quantkit.get_symmetric_qparams(x, **keywords)
    else:
        p = quantkit.get_symmetric_qparams(x, scale_rule="half_range", **keywords)
    of = str(x_dtype).removeprefix("torch.")
    same(PEER, row, f"{of}, scale", scale.float(), p.scale.float())
    if not floating:
        theirs, ours = zero_point.float() + 0.0, p.zero_point.float() + 0.0
        same(PEER, row, f"{of}, zero point", theirs, ours)

    given = QuantizationParams(
        scale, zero_point.to(x_dtype), p.q_min, p.q_max, dtype=p.dtype, block_size=(1, block)
    )
    ours = quantkit.quantize_tensor(x, given)
    if format == "int4":
        theirs = pack_to_int32(q, 4)
        ours = (ours ^ 0x88).view(torch.int32)
        same(PEER, row, f"{of}, words of 8 codes", theirs, ours)
        plain = QuantizationParams(scale, 0.0, -8, 7, dtype=torch.int8, block_size=(1, block))
        ours = quantkit.quantize_tensor(x, plain)
        same(PEER, row, f"{of}, codes, dtype=torch.int8", q, ours)
    else:
        same(PEER, row, f"{of}, codes", q, ours)
    if half and format == "int8":  # version 1's steps above are in bfloat16; float32 steps differ
        given.compute_dtype = F32
        ours = quantkit.quantize_tensor(x, given)
        same(PEER, row, f"{of}, codes, compute_dtype=torch.float32", q, ours)
    if not half:
        back = dequantize(q, scale, zeros, args)
        given.compute_dtype = F32
        x_hat = quantkit.dequantize_tensor(quantkit.quantize_tensor(x, given), given)
        same(PEER, row, f"{of}, back", back, x_hat)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_given_scales(x_dtype):
    """Beyond the limits too, with infinities, signed zeros and, in float8, NaN."""
    of = f"{str(x_dtype)[6:]}, given scales"
    g = given(x_dtype, -128, 127)
    args = QuantizationArgs(num_bits=8, type="int", symmetric=False, strategy="channel")
    scale, zero_point = g.scale.to(x_dtype), g.zero_point.to(x_dtype)
    q = quantize(g.x, scale, zero_point, args, dtype=torch.int8)
    p = QuantizationParams(scale, zero_point, -128, 127)
    same(PEER, "compressed-tensors int8, asymmetric", of, q, quantkit.quantize_tensor(g.x, p))
    if x_dtype == F32:
        g = given(x_dtype, -448, 448, zero_points=False, nan=True)
        args = QuantizationArgs(num_bits=8, type="float", strategy="channel")
        q = quantize(g.x, g.scale, None, args, dtype=torch.float8_e4m3fn).view(torch.uint8)
        p = QuantizationParams(g.scale, 0.0, -448, 448, dtype=torch.float8_e4m3fn)
        q = torch.where(g.x.isnan(), q & 127, q).view(torch.float8_e4m3fn)  # the sign of a NaN
        same(PEER, "compressed-tensors float8", of, q, quantkit.quantize_tensor(g.x, p))
