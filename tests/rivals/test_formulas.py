"""Peers that need a GPU or a model: the formula of their source as torch code. They are not run.

DeepSeek-V3, DeepGEMM, TransformerEngine and vLLM run on CUDA alone. AutoAWQ and GPTQModel compute on any
device, but import what this environment lacks.
"""

import pytest
import torch
from lib.rivals import COLUMNS, DTYPES, ROWS, chosen, given, same

import quantkit
from quantkit import QuantizationParams
from quantkit.formats import OF_NAME

F8, F32 = torch.float8_e4m3fn, torch.float32
SOURCE = "by its source"


def name(dtype):
    return str(dtype).removeprefix("torch.")


def blocks_of(x, block):
    return x.view(ROWS, -1, block)


def cast(v):
    """To float8: the limits beyond them, as every source here."""
    return v.clamp(-448, 448).to(F8)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
def test_deepseek(x_dtype):
    x = chosen(x_dtype, 14.0, 128)
    blocks = blocks_of(x.float(), 128)
    scale = blocks.abs().amax(2) / 448.0
    q = cast(blocks / scale.unsqueeze(2)).view(x.shape)
    ours, p = quantkit.dynamic_quantize(x, dtype=F8, block_size=[1, 128])
    same(SOURCE, "DeepSeek-V3 act_quant", f"{name(x_dtype)}, scale", scale, p.scale)
    same(SOURCE, "DeepSeek-V3 act_quant", f"{name(x_dtype)}, codes", q, ours)
    squares = x.float().view(ROWS // 128, 128, -1, 128)
    scale = squares.abs().amax((1, 3)) / 448.0
    q = cast(squares / scale[:, None, :, None]).view(x.shape)
    ours, p = quantkit.quantize(x, "fp8_block128")
    same(SOURCE, "DeepSeek-V3 weights, 128 × 128", f"{name(x_dtype)}, scale", scale, p.scale)
    same(SOURCE, "DeepSeek-V3 weights, 128 × 128", f"{name(x_dtype)}, codes", q, ours)


LEAST = (torch.tensor(1e-4) / 448).item()


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
def test_deepgemm(x_dtype):
    x = chosen(x_dtype, 14.0, 128)
    blocks = blocks_of(x, 128)
    scale = blocks.abs().float().amax(2).clamp(1e-4) / 448.0
    q = cast(blocks * (1.0 / scale.unsqueeze(2))).view(x.shape)
    ours, p = quantkit.dynamic_quantize(x, dtype=F8, block_size=[1, 128], eps=LEAST)
    row, of = "DeepGEMM per_token_cast_to_fp8", name(x_dtype)
    same(SOURCE, row, f"{of}, scale", scale, p.scale)
    same(SOURCE, row, f"{of}, codes", q, ours)
    v = (blocks * (1.0 / scale.unsqueeze(2))).view(x.shape)
    one = QuantizationParams(1.0, 0.0, -448, 448, dtype=F8)
    same(SOURCE, row, f"{of}, codes, x · (1 / scale)", q, quantkit.quantize_tensor(v, one))


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
def test_transformer_engine(x_dtype):
    x = chosen(x_dtype, 14.0, 128)
    row, of = "TransformerEngine float8, current and block scaling", name(x_dtype)
    blocks = blocks_of(x.float(), 128)
    amax = blocks.abs().amax(2)
    factor = torch.full_like(amax, 448.0) / amax
    q = cast(blocks * factor.unsqueeze(2)).view(x.shape)
    ours, p = quantkit.dynamic_quantize(x, dtype=F8, block_size=[1, 128])
    same(SOURCE, row, f"{of}, scale (1 / factor)", 1.0 / factor, p.scale)
    same(SOURCE, row, f"{of}, codes", q, ours)
    one = QuantizationParams(1.0, 0.0, -448, 448, dtype=F8)
    v = (blocks * factor.unsqueeze(2)).view(x.shape)
    same(SOURCE, row, f"{of}, codes, x · (448 / amax)", q, quantkit.quantize_tensor(v, one))


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
def test_vllm_float8(x_dtype):
    of = name(x_dtype)
    x = chosen(x_dtype, 14.0)
    least = 1.0 / (448 * 512)
    scale = (x.float().abs().amax(1, True) / 448.0).clamp(min=least)
    p = quantkit.get_symmetric_qparams(x, dtype=F8, block_size=[1, -1], eps=least)
    row = "vLLM float8, per token"
    same(SOURCE, row, f"{of}, scale", scale, p.scale)
    same(SOURCE, row, f"{of}, codes", cast(x.float() / scale), quantkit.quantize_tensor(x, p))
    row = "vLLM float8, given scale"
    theirs = cast(x.float() * (1.0 / scale))
    same(SOURCE, row, f"{of}, codes", theirs, quantkit.quantize_tensor(x, p))
    one = QuantizationParams(1.0, 0.0, -448, 448, dtype=F8)
    ours = quantkit.quantize_tensor(x.float() * (1.0 / scale), one)
    same(SOURCE, row, f"{of}, codes, x · (1 / scale)", theirs, ours)

    x = chosen(x_dtype, 14.0, 128)
    least = (torch.tensor(1e-10) / 448).item()
    blocks = blocks_of(x.float(), 128)
    scale = blocks.abs().amax(2).clamp(min=1e-10) / 448.0
    ours, p = quantkit.dynamic_quantize(x, dtype=F8, block_size=[1, 128], eps=least)
    row = "vLLM float8, groups"
    same(SOURCE, row, f"{of}, scale", scale, p.scale)
    same(SOURCE, row, f"{of}, codes", cast(blocks / scale.unsqueeze(2)).view(x.shape), ours)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
def test_vllm_int8(x_dtype):
    of = name(x_dtype)
    g = given(x_dtype, -128, 127)
    p = QuantizationParams(g.scale, g.zero_point, -128, 127, compute_dtype=F32, round_first=True)
    x = g.x.clamp(-1e6, 1e6)  # beyond int32 the sum wraps there
    theirs = (torch.round(x.float() / g.scale) + g.zero_point).clamp(-128, 127).to(torch.int8)
    same(SOURCE, "vLLM int8, given scale and azp", of, theirs, quantkit.quantize_tensor(x, p))

    x = chosen(x_dtype, 127.0)
    largest = x.float().abs().amax(1, True)
    theirs = torch.round(x.float() * (127.0 / largest)).to(torch.int8)
    ours, p = quantkit.quantize(x, "int8_token")
    row = "vLLM int8, per token"
    same(SOURCE, row, f"{of}, scale", largest / 127.0, p.scale)
    same(SOURCE, row, f"{of}, codes", theirs, ours)
    v = x.float() * (127.0 / largest)
    ours = quantkit.quantize_tensor(v, QuantizationParams(1.0, 0.0, -128, 127))
    same(SOURCE, row, f"{of}, codes, x · (127 / amax)", theirs, ours)

    low, high = x.float().amin(1, True), x.float().amax(1, True)
    scale = (high - low) / 255.0
    zero_point = torch.round(-128.0 - low / scale)
    theirs = (torch.round(x.float() / scale) + zero_point).clamp(-128, 127).to(torch.int8)
    ours, p = quantkit.dynamic_quantize(
        x, sym=False, block_size=[1, -1], compute_dtype=F32, round_first=True
    )
    row = "vLLM int8, per token with azp"
    same(SOURCE, row, f"{of}, scale", scale, p.scale)
    same(SOURCE, row, f"{of}, zero point", zero_point + 0.0, p.zero_point)
    same(SOURCE, row, f"{of}, codes", theirs, ours)


def test_awq():
    """The two branches of pseudo_quantize_tensor, in float32."""
    x = chosen(F32, 7.5, 128)
    blocks = blocks_of(x, 128)
    low, high = blocks.amin(2), blocks.amax(2)
    scale = (high - low).clamp(min=1e-5) / 15
    zero_point = (-torch.round(low / scale)).clamp(0, 15)
    theirs = torch.round(blocks / scale.unsqueeze(2)) + zero_point.unsqueeze(2)
    theirs = theirs.clamp(0, 15).to(torch.uint8).view(x.shape)
    q, p = quantkit.dynamic_quantize(
        x, dtype="uint4", sym=False, block_size=[1, 128], round_first=True,
        eps=(torch.tensor(1e-5) / 15).item(),
    )  # fmt: skip
    row = "AWQ, zero_point"
    same(SOURCE, row, "float32, scale", scale, p.scale)
    same(SOURCE, row, "float32, zero point", zero_point + 0.0, p.zero_point)
    same(SOURCE, row, "float32, codes", theirs, OF_NAME["uint4"].unpack(q))
    scale = blocks.abs().amax(2).clamp(min=1e-5) / 7
    theirs = torch.round(blocks / scale.unsqueeze(2)).clamp(-8, 7).to(torch.int8).view(x.shape)
    q, p = quantkit.dynamic_quantize(
        x, dtype="int4", block_size=[1, 128], eps=(torch.tensor(1e-5) / 7).item()
    )
    row = "AWQ, symmetric"
    same(SOURCE, row, "float32, scale", scale, p.scale)
    same(SOURCE, row, "float32, codes", theirs.view(torch.uint8) & 15, OF_NAME["int4"].unpack(q))


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq(symmetric):
    """Its scale and zero point, and the rounding of one column; the order of columns is GPTQ's own."""
    x = chosen(F32, 7.5, 128)
    blocks = blocks_of(x, 128)
    low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    scale = (high - low) / 15
    zero_point = torch.full_like(scale, 8.0) if symmetric else torch.round(-low / scale)
    theirs = torch.round(blocks / scale.unsqueeze(2)) + zero_point.unsqueeze(2)
    theirs = theirs.clamp(0, 15).to(torch.uint8).view(x.shape)
    options = {"block_size": [1, 128], "round_first": True}
    row = "GPTQ, sym" if symmetric else "GPTQ, asymmetric"
    if symmetric:
        q, p = quantkit.dynamic_quantize(x, dtype="int4", scale_rule="half_range", **options)
        theirs = theirs ^ 8  # uint4 with the zero point 8 as int4
    else:
        q, p = quantkit.dynamic_quantize(x, dtype="uint4", sym=False, include_zero=True, **options)
        same(SOURCE, row, "float32, zero point", zero_point, p.zero_point)
    same(SOURCE, row, "float32, scale", scale, p.scale)
    ours = OF_NAME["int4" if symmetric else "uint4"].unpack(q)
    same(SOURCE, row, "float32, codes", theirs, ours)
    assert theirs.shape == (ROWS, COLUMNS)
