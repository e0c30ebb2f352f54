"""A user's module under strict type checking: every public name, as its page says (never run)."""

from collections.abc import Sequence
from typing import assert_type

import torch

import quantkit
from quantkit import QuantizationParams, reference


def functions(x: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
    p = quantkit.get_symmetric_qparams(x, True, 0, torch.int8, 1e-8, q_min=-127, q_max=127)
    assert_type(p, QuantizationParams)
    assert_type(quantkit.get_asymmetric_qparams(x, include_zero=True), QuantizationParams)
    q = assert_type(quantkit.quantize_tensor(x, p), torch.Tensor)
    assert_type(quantkit.dequantize_tensor(q, p), torch.Tensor)
    codes, x_hat, _ = quantkit.quantize_dequant(x, per_channel=True, channel_dim=-1, sym=False)
    assert_type(codes, torch.Tensor)
    assert_type(x_hat, torch.Tensor)
    q, p = quantkit.dynamic_quantize(x, block_size=blocks, dtype=torch.uint8, eps=1e-6)
    assert_type(quantkit.dequantize_tensor(q, p, output_dtype=torch.float16), torch.Tensor)
    q, p = quantkit.dynamic_quantize(x, dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    q, p = quantkit.dynamic_quantize(x, dtype="int4", block_size=[1, 128], scale_rule="half_range")
    q, p = assert_type(
        quantkit.quantize(x, "fp8_block128"), tuple[torch.Tensor, QuantizationParams]
    )
    q, p = quantkit.quantize(x, {"dtype": torch.uint16, "block_size": (-1,)}, eps=1e-6)
    assert_type(quantkit.dequantize(q, p, output_dtype=torch.bfloat16), torch.Tensor)
    assert_type(quantkit.SCHEMES["int8_token"], str)
    return quantkit.fake_quantize(x, p)


def parameters() -> QuantizationParams:
    p = QuantizationParams(torch.ones(()), torch.zeros(()), -8, 7, dtype=torch.int8)
    assert_type(QuantizationParams(0.1, 0, -8, 7), QuantizationParams)
    assert_type(p.scale, torch.Tensor)
    assert_type(p.q_min, int)
    assert_type(p.dtype, torch.dtype | None)
    assert_type(p.block_size, tuple[int, ...] | None)
    assert_type(p.compute_dtype, torch.dtype | None)
    QuantizationParams(0.1, 0, -8, 7, dtype=torch.int8, block_size=[1, 4], round_first=True)
    return p


def reference_functions(x: torch.Tensor) -> torch.Tensor:
    q, p = reference.dynamic_quantize(x, True, sym=False)
    assert_type(reference.quantize_dequant(x)[2], QuantizationParams)
    assert_type(reference.get_symmetric_qparams(x), QuantizationParams)
    assert_type(reference.get_asymmetric_qparams(x), QuantizationParams)
    assert_type(reference.quantize_tensor(x, p), torch.Tensor)
    assert_type(reference.fake_quantize(x, p), torch.Tensor)
    return reference.dequantize_tensor(q, p)


def backend() -> str:
    b = quantkit.backend()
    assert_type(b.extension, bool)
    assert_type(b.isas, tuple[str, ...])
    assert_type(b.threads, int)
    return f"{quantkit.__version__} {b.isa} {b.reason} {b.cuda_archs} {b.contract}"
