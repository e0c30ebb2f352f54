"""Shapes and dtypes of the operators' results, for torch.compile, export and meta tensors."""

from __future__ import annotations

import sys

import torch

from . import _checks, _torch
from .reference import first_dtype, parameter_shape


def _result(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(like, dtype=dtype, requires_grad=False)


def _dequantized_dtype(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor):
    zero_point_dtype = zero_point.dtype if zero_point.is_floating_point() else scale.dtype
    for p, dtype in ((scale, scale.dtype), (zero_point, zero_point_dtype)):
        if dtype == torch.float64 and (p.dim() > 0 or q.dim() == 0):
            return torch.float64
    return torch.float32


def choose_qparams(x, block_size, q_min, q_max, eps, symmetric, include_zero=False):
    _checks.choose_qparams(x, block_size, q_min, q_max, eps, symmetric, include_zero)
    shape = parameter_shape(x.shape, block_size)
    dtype = first_dtype(x, q_min, q_max)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


_AOT_CHANGES_DTYPES = _torch.RELEASE < (2, 12)


def _check_compiler() -> None:
    """AOTInductor before torch 2.12 hands operators another dtype than was asked for (pytorch#169157)."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    if _AOT_CHANGES_DTYPES and virtualized and virtualized.V.aot_compilation:
        raise RuntimeError(
            "AOTInductor before torch 2.12 changes the dtype of operators' results; "
            "remedy: package with torch 2.12 or newer, or use torch.export alone"
        )


def quantize(x, scale, zero_point, q_min, q_max, dtype):
    _check_compiler()
    _checks.quantize(x, scale, zero_point, q_min, q_max, dtype)
    return _result(x, dtype)


def dequantize(q, scale, zero_point):
    _checks.dequantize(q, scale, zero_point)
    return _result(q, _dequantized_dtype(q, scale, zero_point))


def dynamic_quantize(x, block_size, q_min, q_max, eps, symmetric, dtype, include_zero=False):
    _check_compiler()
    _checks.dynamic_quantize(x, block_size, q_min, q_max, eps, symmetric, dtype, include_zero)
    params = choose_qparams(x, block_size, q_min, q_max, eps, symmetric, include_zero)
    return _result(x, dtype), *params


def quantize_dequantize(x, block_size, q_min, q_max, eps, symmetric, dtype, include_zero=False):
    q, *params = dynamic_quantize(x, block_size, q_min, q_max, eps, symmetric, dtype, include_zero)
    return q, _result(q, _dequantized_dtype(q, *params)), *params


def fake_quantize(x, scale, zero_point, q_min, q_max):
    _checks.quantize(x, scale, zero_point, q_min, q_max)
    return _result(x, x.dtype if x.is_floating_point() else torch.float32)


def fake_quantize_backward(grad, x, scale, zero_point, q_min, q_max):
    _checks.fake_quantize_backward(grad, x, scale, zero_point, q_min, q_max)
    return _result(x, x.dtype)
