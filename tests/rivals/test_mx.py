"""MX and NVFP4 of torchao and compressed-tensors."""

import logging

import pytest
import torch
from lib.rivals import COLUMNS, DTYPES, ROWS, bell, chosen, needs, same

import quantkit
from quantkit import QuantizationParams

logging.getLogger("torchao").setLevel(logging.ERROR)
needs("torchao")
needs("compressed-tensors")
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import quantize  # noqa: E402
from compressed_tensors.quantization.utils.helpers import (  # noqa: E402
    calculate_qparams,
    generate_gparam,
)
from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor  # noqa: E402

F8, F4, E8 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2, torch.float8_e8m0fnu
# Where max |x| / largest is a power of two in chosen(): 448 / 32, and 6.
FORMATS = {"MXFP8": (F8, 14.0), "MXFP4": (F4, 6.0)}
MODES = {"FLOOR": "floor", "RCEIL": "ceil", "EVEN": "even"}


def name(dtype):
    return str(dtype).removeprefix("torch.")


def raw(t):
    """The bytes of codes or of coded scales."""
    return t.contiguous().view(torch.uint8).view(ROWS, -1)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS)
def test_torchao_mx(format, mode, x_dtype):
    dtype, largest = FORMATS[format]
    x = chosen(x_dtype, largest, 32)
    scale, q = mx_tensor.to_mx(x, dtype, 32, getattr(mx_tensor.ScaleCalculationMode, mode))
    ours, p = quantkit.dynamic_quantize(
        x, block_size=[1, 32], dtype=dtype, scale_dtype=E8, scale_rule=MODES[mode]
    )
    row, of = f"torchao {format}", f"{mode}, {name(x_dtype)}"
    same("torchao", row, f"{of}, scale", raw(scale), raw(p.scale))
    same("torchao", row, f"{of}, codes", raw(q), raw(ours))


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS)
def test_torchao_mx_blocks_that_differ(format, mode, x_dtype):
    """As the page's table says, which has what neither chosen() nor its rows have."""
    dtype, _ = FORMATS[format]
    x = (bell(4, 4, 32) / 2).clamp(-1, 1)
    x *= torch.tensor([[1.0], [1.0], [4e-39], [4e-39]])
    x[:, 0] = torch.tensor([torch.nan, torch.inf, 1.2e-38, 1e-38])
    x = x.to(x_dtype)
    scale, q = mx_tensor.to_mx(x, dtype, 32, getattr(mx_tensor.ScaleCalculationMode, mode))
    ours, p = quantkit.dynamic_quantize(
        x, block_size=[1, 32], dtype=dtype, scale_dtype=E8, scale_rule=MODES[mode]
    )
    q, ours, scale, ours_scale = (
        t.view(torch.uint8).view(4, -1) for t in (q, ours, scale, p.scale)
    )
    is_ceil, is_fp8 = mode == "RCEIL", dtype == F8
    magnitude = 0x7F if is_fp8 else 0x77
    largest = 254 if is_ceil else 247 if is_fp8 else 253
    assert scale.flatten().tolist() == [255, largest, 0, 0]
    assert ours_scale.flatten().tolist() == [255, 254, 0, 0]
    assert (ours[0] == (0x7F if is_fp8 else 0)).all()
    if is_ceil:
        assert (q[0] == (0x7F if is_fp8 else 0x33)).all() and (q[2:] & magnitude == 0).all()
    else:
        assert (q[0] != ours[0]).any()
        there = QuantizationParams(2.0**-126, 0.0, p.q_min, p.q_max, dtype=dtype)
        there = quantkit.quantize_tensor(x[2:], there).view(torch.uint8)
        assert torch.equal(q[2:], there)
    assert torch.equal(q[1], ours[1])
    here = QuantizationParams(2.0**-127, 0.0, p.q_min, p.q_max, dtype=dtype)
    assert torch.equal(ours[2:], quantkit.quantize_tensor(x[2:], here).view(torch.uint8))
    assert (q[2:] != ours[2:]).any(1).all()


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("two_levels", [True, False])
def test_torchao_nvfp4(two_levels, x_dtype):
    x = chosen(x_dtype, 6.0, 16)
    g = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().amax()) if two_levels else None
    scale, q = nvfp4_tensor.nvfp4_quantize(x, 16, g)
    ours, p = quantkit.dynamic_quantize(
        x, block_size=[1, 16], dtype=F4, scale_dtype=F8, global_scale=g
    )
    row = f"torchao NVFP4, {'two levels' if two_levels else 'one level'}"
    same("torchao", row, f"{name(x_dtype)}, scale", raw(scale), raw(p.scale))
    same("torchao", row, f"{name(x_dtype)}, codes", raw(q), raw(ours))
    if two_levels:
        _, p = quantkit.quantize(x, "nvfp4")
        same("torchao", row, f"{name(x_dtype)}, global scale", g, p.global_scale)


def compressed(x, args, block, global_scale=None):
    blocks = x.view(ROWS, -1, block)
    low, high = blocks.amin(2), blocks.amax(2)
    scale, _ = calculate_qparams(low, high, args, global_scale=global_scale)
    return scale, quantize(x, scale, None, args, global_scale=global_scale)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("format", FORMATS)
def test_compressed_tensors_mx(format, x_dtype):
    dtype, largest = FORMATS[format]
    # + 0.0: -0.0 loses its sign there. 12 and 6: max |x| = 448 · 2^k gets the scale twice as large.
    x = chosen(x_dtype, min(largest, 12.0), 32) + 0.0
    args = QuantizationArgs(
        num_bits=8 if dtype == F8 else 4, type="float", strategy="group", group_size=32,
        scale_dtype=torch.uint8, zp_dtype=torch.uint8,
    )  # fmt: skip
    scale, numbers = compressed(x, args, 32)
    codes = numbers.to(F8) if dtype == F8 else pack_fp4_to_uint8(numbers)
    exponents = (torch.log2(scale.float()) + 127).to(torch.uint8)
    ours, p = quantkit.dynamic_quantize(
        x, block_size=[1, 32], dtype=dtype, scale_dtype=E8,
        scale_rule="ceil" if dtype == F8 else "even",
    )  # fmt: skip
    row, of = f"compressed-tensors {format}", name(x_dtype)
    same("compressed-tensors", row, f"{of}, scale", exponents, raw(p.scale))
    same("compressed-tensors", row, f"{of}, codes", raw(codes), raw(ours))


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
def test_compressed_tensors_nvfp4(x_dtype):
    x = chosen(x_dtype, 6.0, 16) + 0.0
    args = QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype=F8,
        zp_dtype=F8,
    )
    g = generate_gparam(x.amin(), x.amax())
    scale, numbers = compressed(x, args, 16, g)
    ours, p = quantkit.dynamic_quantize(
        x, block_size=[1, 16], dtype=F4, scale_dtype=F8, global_scale=(1 / g).view(())
    )
    row, of = "compressed-tensors NVFP4", name(x_dtype)
    same("compressed-tensors", row, f"{of}, scale", raw(scale.to(F8)), raw(p.scale))
    p.scale = scale.to(F8)
    ours = quantkit.quantize_tensor(x, p)
    same("compressed-tensors", row, f"{of}, codes", raw(pack_fp4_to_uint8(numbers)), raw(ours))
    assert ours.shape == (ROWS, COLUMNS // 2)
