"""The public functions: each calls one operator of ``torch.ops.quantkit``, opaque to compilers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import _autograd, _checks, _load  # noqa: F401  (_load registers the operators)
from ._checks import NUMBER
from .params import QuantizationParams, choice, unpack

_ops = torch.ops.quantkit
_choose_qparams = _ops.choose_qparams.default
_quantize = _ops.quantize.default
_dequantize = _ops.dequantize.default
_dynamic_quantize = _ops.dynamic_quantize.default
_quantize_dequantize = _ops.quantize_dequantize.default
_fake_quantize = _ops.fake_quantize.default
_fake_quantize_without_gradient = _ops._fake_quantize.default
_is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing
_has_transforms = torch._C._are_functorch_transforms_active


def _call(operator: Callable[..., Any], check: Callable[..., None], *args: object) -> Any:
    """operator(*args); where it refuses, check(*args) names the error by the contract's type."""
    try:
        return operator(*args)
    except Exception as error:  # torch's own refusals of foreign arguments are of any type
        refused = error
    try:
        check(*args)
    except Exception as explained:
        raise explained from None
    raise refused


def get_symmetric_qparams(
    x: torch.Tensor,
    per_channel: bool = False,
    channel_dim: int = 0,
    dtype: torch.dtype = torch.int8,
    eps: float = 1e-8,
    *,
    block_size: Sequence[int] | None = None,
    q_min: int | None = None,
    q_max: int | None = None,
) -> QuantizationParams:
    """Choose a scale that maps max|x| to q_max, with zero_point 0.

    ``scale = max(max|x| / max(q_max, 1), eps)``, rounded after each step to x's dtype (float32 for
    integer x, and for half precision with limits outside [-128, 255]).

    Args:
        x: any real strided tensor with at least one element.
        per_channel: one scale per index of ``channel_dim`` (x's rank kept, size 1 elsewhere); a vector
            is one channel, with a scale of shape (1,).
        channel_dim: the channel's dimension; negative counts from the end.
        dtype: the integer dtype of the codes: torch.int8, torch.uint8 or torch.int16.
        eps: the smallest scale, above 0. The default rounds to 0 in float16, where an all-zero x then
            gets scale 0: pass 1e-7 or more there.
        block_size: one int per dimension of x, -1 for the whole dimension: one scale per block.
        q_min, q_max: limits within those of dtype, such as -127, 127.

    Returns:
        QuantizationParams; scale and zero_point are contiguous, 0-dim for the whole tensor.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what came and what was expected.

    Formula: docs/numerics.md, section 2.
    """
    blocks, q_min, q_max, eps, *_ = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, True
    )
    scale, zero_point = _call(
        _choose_qparams, _checks.choose_qparams, x, blocks, q_min, q_max, eps, True
    )
    return QuantizationParams(scale, zero_point, q_min, q_max, dtype=dtype)


def get_asymmetric_qparams(
    x: torch.Tensor,
    per_channel: bool = False,
    channel_dim: int = 0,
    dtype: torch.dtype = torch.int8,
    eps: float = 1e-8,
    *,
    block_size: Sequence[int] | None = None,
    q_min: int | None = None,
    q_max: int | None = None,
    include_zero: bool = False,
) -> QuantizationParams:
    """Choose a scale and a zero_point that map [min x, max x] to [q_min, q_max].

    ``scale = max((x_max - x_min) / max(q_max - q_min, 1), eps)``;
    ``zero_point = clip(q_min - round(x_min / scale), q_min, q_max)``, a float of scale's dtype.

    Args:
        include_zero: extend [min x, max x] to hold 0, so that 0 is represented exactly.
        The others: as for :func:`get_symmetric_qparams`, which also tells results and errors.

    Formula: docs/numerics.md, section 2.
    """
    blocks, q_min, q_max, eps, _, include_zero = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, False, include_zero
    )
    scale, zero_point = _call(
        _choose_qparams, _checks.choose_qparams,
        x, blocks, q_min, q_max, eps, False, include_zero,
    )  # fmt: skip
    return QuantizationParams(scale, zero_point, q_min, q_max, dtype=dtype)


def quantize_tensor(x: torch.Tensor, qparams: QuantizationParams) -> torch.Tensor:
    """Quantize: ``clip(round(x / scale + zero_point), q_min, q_max)``, half to even, NaN to 0.

    Args:
        x: any real strided tensor.
        qparams: scale and zero_point of any shape that fits x (see QuantizationParams), or of lower
            rank, broadcasting to x's shape.

    Returns:
        Codes of x's shape in ``qparams.dtype`` with the strides of ``torch.empty_like(x)``.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: tensors on different devices.

    Formula: docs/numerics.md, section 2.
    """
    scale, zero_point, q_min, q_max, dtype = unpack(qparams)
    number = NUMBER.get(dtype, dtype)
    return _call(_quantize, _checks.quantize, x, scale, zero_point, q_min, q_max, number)


def dequantize_tensor(q: torch.Tensor, qparams: QuantizationParams) -> torch.Tensor:
    """Dequantize: ``(float32(q) - zero_point) * scale``.

    Args:
        q: codes; any real dtype works, int8, uint8 and int16 are fast.
        qparams: as for :func:`quantize_tensor`; the limits are not used.

    Returns:
        float32 of q's shape (float64 where scale or zero_point is a float64 tensor with dimensions).

    Raises:
        As :func:`quantize_tensor`.

    Formula: docs/numerics.md, section 2.
    """
    scale, zero_point, *_ = unpack(qparams)
    return _call(_dequantize, _checks.dequantize, q, scale, zero_point)


def quantize_dequant(
    x: torch.Tensor,
    per_channel: bool = False,
    channel_dim: int = 0,
    dtype: torch.dtype = torch.int8,
    sym: bool = True,
    *,
    block_size: Sequence[int] | None = None,
    q_min: int | None = None,
    q_max: int | None = None,
    include_zero: bool = False,
    eps: float = 1e-8,
) -> tuple[torch.Tensor, torch.Tensor, QuantizationParams]:
    """Choose parameters, quantize and dequantize in one call: ``(q, x_hat, qparams)``.

    The same bits as :func:`get_symmetric_qparams` (or, with ``sym=False``,
    :func:`get_asymmetric_qparams`), :func:`quantize_tensor` and :func:`dequantize_tensor` in turn;
    their pages tell arguments, results and errors.
    """
    blocks, q_min, q_max, eps, sym, include_zero = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, sym, include_zero
    )
    q, x_hat, scale, zero_point = _call(
        _quantize_dequantize, _checks.dynamic_quantize,
        x, blocks, q_min, q_max, eps, sym, NUMBER.get(dtype, dtype), include_zero,
    )  # fmt: skip
    return q, x_hat, QuantizationParams(scale, zero_point, q_min, q_max, dtype=dtype)


def dynamic_quantize(
    x: torch.Tensor,
    per_channel: bool = False,
    channel_dim: int = 0,
    dtype: torch.dtype = torch.int8,
    sym: bool = True,
    *,
    block_size: Sequence[int] | None = None,
    q_min: int | None = None,
    q_max: int | None = None,
    include_zero: bool = False,
    eps: float = 1e-8,
) -> tuple[torch.Tensor, QuantizationParams]:
    """Choose parameters and quantize with them in one call: ``(q, qparams)``.

    The same as :func:`quantize_dequant` without the reconstruction.
    """
    blocks, q_min, q_max, eps, sym, include_zero = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, sym, include_zero
    )
    q, scale, zero_point = _call(
        _dynamic_quantize, _checks.dynamic_quantize,
        x, blocks, q_min, q_max, eps, sym, NUMBER.get(dtype, dtype), include_zero,
    )  # fmt: skip
    return q, QuantizationParams(scale, zero_point, q_min, q_max, dtype=dtype)


def fake_quantize(x: torch.Tensor, qparams: QuantizationParams) -> torch.Tensor:
    """Quantize and dequantize in x's dtype, with the straight-through gradient.

    The values of ``dequantize_tensor(quantize_tensor(x, qparams), qparams)`` cast to x's dtype (float32
    for integer x), without the integer tensor. The gradient with respect to x is the incoming one where
    q_min <= round(x / scale + zero_point) <= q_max, 0 elsewhere and at NaN; scale and zero_point get
    none. Arguments and errors: :func:`quantize_tensor`.
    """
    scale, zero_point, q_min, q_max, _ = unpack(qparams)
    operator: Callable[..., Any]
    if _is_compiling() or _is_tracing():
        operator = _fake_quantize  # a graph may be differentiated later, and read by others
    elif _has_transforms() and _autograd.is_transformed():
        operator = _autograd.FakeQuantize.apply
    elif _autograd.is_differentiable(x):
        operator = _fake_quantize
    else:
        operator = _fake_quantize_without_gradient
    return _call(operator, _checks.quantize, x, scale, zero_point, q_min, q_max)
