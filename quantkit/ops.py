"""The public functions, written once over operators: torch.ops.quantkit's, opaque to compilers, here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .params import QuantizationParams, choice, unpack


@dataclass
class Operators:
    """What the functions call. Each raises the contract's exact errors."""

    choose_qparams: Callable[..., Any]
    quantize: Callable[..., Any]
    dequantize: Callable[..., Any]
    dynamic_quantize: Callable[..., Any]
    quantize_dequantize: Callable[..., Any]
    fake_quantize: Callable[..., Any]


# Operators, from _load, which registers them; quantkit.reference has its own.
operators: Any = None  # version 1's overloads
format_operators: Any = None  # the .format overloads


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
    """Choose a scale that maps max |x| to q_max. The zero point is 0.

    ``scale = max(max |x| / max(q_max, 1), eps)``. Each step is rounded to x's dtype. Integer x, and half
    precision with limits outside [-128, 255], become float32 first.

    | granularity | arguments | scale.shape for x of shape (R, C) |
    |---|---|---|
    | tensor | none | ``()`` |
    | channel (row) | ``per_channel=True`` | ``(R, 1)`` |
    | channel (column) | ``per_channel=True, channel_dim=1`` | ``(1, C)`` |
    | token | ``block_size=[1, -1]`` | ``(R, 1)`` |
    | group of 128 | ``block_size=[1, 128]`` | ``(R, C // 128)`` |
    | block of 128 × 128 | ``block_size=[128, 128]`` | ``(R // 128, C // 128)`` |

    Args:
        x: a dense tensor of any real dtype and any strides. It needs an element for each scale.
        per_channel: whether each index of ``channel_dim`` gets a scale of its own. A vector is one
            channel with a scale of shape ``(1,)``.
        channel_dim: the dimension of the channels. A negative one counts from the end.
        dtype: the dtype of the codes: ``torch.int8``, ``torch.uint8`` or ``torch.int16``.
        eps: the smallest scale, above 0. Values far below eps become 0: pass a smaller eps for them.
        block_size: one int for each dimension of x; -1 stands for the whole dimension.
        q_min, q_max: limits within those of dtype, such as -127 and 127.

    Returns:
        QuantizationParams with contiguous scale and zero_point. Both are 0-dim for a whole tensor.

    Raises:
        TypeError, ValueError or IndexError that names the argument, its value and what was expected.

    Warning:
        ``dtype=torch.uint8`` has no negative codes, so the symmetric scheme turns negative x into 0.
        Use :func:`get_asymmetric_qparams` there.

        In float16 the default eps rounds to 0, and an all-zero x gets scale 0: pass ``eps=1e-7``.

        bfloat16 rounds every step, which costs about 0.6 dB of SQNR: pass ``x.float()``.

    docs/numerics.md has the formula, docs/options.md helps to choose.
    """
    blocks, q_min, q_max, eps, _, _, _ = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, True, False
    )
    scale, zero_point = operators.choose_qparams(x, blocks, q_min, q_max, eps, True)
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
    """Choose a scale and a zero point that map [min x, max x] to [q_min, q_max].

    ``scale = max((x_max - x_min) / max(q_max - q_min, 1), eps)``;
    ``zero_point = clip(q_min - round(x_min / scale), q_min, q_max)``, a float of scale's dtype.

    Args:
        include_zero: extend [min x, max x] to hold 0, so that 0 is exact and data of one sign works.
        The other arguments, granularities, results and errors: :func:`get_symmetric_qparams`.

    Warning:
        Pass ``include_zero=True`` unless each block of x has values on both sides of 0. Without it the
        zero point is clipped, and data of one sign collapses. A LayerNorm weight comes back with an
        SQNR of 6.5 dB, with ``include_zero=True`` of 57 dB.

        In float16 the default eps rounds to 0, and an all-zero row becomes NaN: pass ``eps=1e-7``.

        In float16 a range max x - min x above 65504 overflows, and the block becomes NaN: pass
        ``x.float()``.

        bfloat16 rounds every step, which costs about 0.6 dB of SQNR: pass ``x.float()``.

    docs/numerics.md has the formula, docs/options.md helps to choose.
    """
    blocks, q_min, q_max, eps, _, include_zero, _ = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, False, include_zero
    )
    scale, zero_point = operators.choose_qparams(x, blocks, q_min, q_max, eps, False, include_zero)
    return QuantizationParams(scale, zero_point, q_min, q_max, dtype=dtype)


def quantize_tensor(x: torch.Tensor, qparams: QuantizationParams) -> torch.Tensor:
    """Return the codes ``clip(round(x / scale + zero_point), q_min, q_max)``, half to even, NaN to 0.

    Args:
        x: a dense tensor of any real dtype and any strides.
        qparams: scale and zero_point of a shape that fits x (see QuantizationParams), or of lower rank
            and broadcasting to x's shape.

    Returns:
        Codes of x's shape in ``qparams.dtype`` with the strides of ``torch.empty_like(x)``.

    Raises:
        TypeError or ValueError that names the argument, its value and what was expected.
        RuntimeError where tensors are on different devices.

    Note:
        The zero point is added before rounding. ONNX and ``torch.fake_quantize_per_tensor_affine`` add it
        after, so codes at ties differ where the zero point is odd.

    docs/numerics.md has the formula.
    """
    return operators.quantize(x, *unpack(qparams))


def dequantize_tensor(q: torch.Tensor, qparams: QuantizationParams) -> torch.Tensor:
    """Return ``(float32(q) - zero_point) * scale``.

    Args:
        q: codes of any real dtype; int8, uint8 and int16 are fast.
        qparams: as for :func:`quantize_tensor`. The limits are not used.

    Returns:
        float32 of q's shape. It is float64 where scale or zero_point is a float64 tensor with dimensions.

    Raises:
        The errors of :func:`quantize_tensor`.

    docs/numerics.md has the formula.
    """
    scale, zero_point, _, _, _ = unpack(qparams)
    return operators.dequantize(q, scale, zero_point)


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

    The bits are those of three calls: :func:`get_symmetric_qparams` (with ``sym=False``
    :func:`get_asymmetric_qparams`), :func:`quantize_tensor` and :func:`dequantize_tensor`.

    Args:
        sym: False takes the asymmetric scheme. Pass ``include_zero=True`` with it, unless each block of x
            has values on both sides of 0.
        The other arguments, results, errors and warnings: those of the three functions.
    """
    blocks, q_min, q_max, eps, sym, include_zero, code = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, sym, include_zero
    )
    q, x_hat, scale, zero_point = operators.quantize_dequantize(
        x, blocks, q_min, q_max, eps, sym, code, include_zero
    )
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
    """Choose parameters and quantize in one call: ``(q, qparams)``.

    This is :func:`quantize_dequant` without the reconstruction.
    """
    blocks, q_min, q_max, eps, sym, include_zero, code = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, sym, include_zero
    )
    q, scale, zero_point = operators.dynamic_quantize(
        x, blocks, q_min, q_max, eps, sym, code, include_zero
    )
    return q, QuantizationParams(scale, zero_point, q_min, q_max, dtype=dtype)


def fake_quantize(x: torch.Tensor, qparams: QuantizationParams) -> torch.Tensor:
    """Quantize and dequantize in x's dtype, with the straight-through gradient.

    The values are those of ``dequantize_tensor(quantize_tensor(x, qparams), qparams)``, cast to x's dtype
    (float32 for integer x). No tensor of codes is made. The gradient of x is the incoming one where
    ``q_min <= round(x / scale + zero_point) <= q_max``. It is 0 elsewhere and at NaN. scale and
    zero_point get none. For the gradient autograd keeps a mask of one byte an element.

    Arguments and errors are those of :func:`quantize_tensor`.
    """
    scale, zero_point, q_min, q_max, _ = unpack(qparams)
    return operators.fake_quantize(x, scale, zero_point, q_min, q_max)
