"""The definition: what every backend of quantkit returns, to the last bit (docs/numerics.md).

Plain torch operations, each rounded to its own dtype, in eager mode, on any device. It is also what
runs where the compiled extension does not. Never let a compiler trace it: inductor computes half
precision wider. Top half: the six operators. Bottom half: the public functions over them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import _checks
from .params import QuantizationParams, choice, unpack

__all__ = [
    "QuantizationParams",
    "dequantize_tensor",
    "dynamic_quantize",
    "fake_quantize",
    "get_asymmetric_qparams",
    "get_symmetric_qparams",
    "quantize_dequant",
    "quantize_tensor",
]

_Blocks = Sequence[int] | None
_HALF = (torch.float16, torch.bfloat16)


# ---- pieces ---------------------------------------------------------------------------------------


def _is_wide(q_min: int, q_max: int) -> bool:
    """Whether half precision cannot hold the limits (possible with int16 only)."""
    return q_min < -128 or q_max > 255


def first_dtype(x: torch.Tensor, q_min: int, q_max: int) -> torch.dtype:
    """The dtype that x takes before the first step."""
    if not x.is_floating_point() or (x.dtype in _HALF and _is_wide(q_min, q_max)):
        return torch.float32
    return x.dtype


def parameter_shape(shape: Sequence[int], block_size: Sequence[int] | None) -> list[int]:
    """The shape of scale and zero_point: how many blocks each dimension has; 0-dim for None."""
    if block_size is None:
        return []
    return [1 if b == -1 else n // b for n, b in zip(shape, block_size, strict=True)]


def _to(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """t in dtype; float64 reaches half precision through float32, on every device."""
    return t.to(torch.float32).to(dtype) if dtype in _HALF else t.to(dtype)


def _takes_scalar(t: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Half precision with dimensions keeps its dtype beside a 0-dim parameter."""
    return t.dtype in _HALF and t.dim() > 0 and parameter.dim() == 0


def _divide(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if _takes_scalar(x, scale):  # the quotient of the full scale, rounded once
        return (x.to(torch.float32) / scale.to(torch.float32)).to(x.dtype)
    return x / scale


def _add(v: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    if _takes_scalar(v, zero_point):  # the zero point rounded first
        return v + _to(zero_point, v.dtype)
    return v + zero_point


def _divide_by_int(t: torch.Tensor, n: int) -> torch.Tensor:
    """A true division on every device: by a tensor, never by a number (CUDA would multiply by 1/n)."""
    wide = torch.float32 if t.dtype in _HALF else t.dtype
    return (t.to(wide) / torch.full((), n, dtype=wide, device=t.device)).to(t.dtype)


def _expand(p: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A parameter over blocks, repeated until it broadcasts; its rank stays."""
    if p.dim() == len(shape):
        for dim, (size, whole) in enumerate(zip(p.shape, shape, strict=True)):
            if size not in (0, 1, whole):
                p = p.repeat_interleave(whole // size, dim)
    return p


def _parameters(
    shape: Sequence[int],
    device: torch.device,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    wide: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale and zero_point as floats that broadcast to shape, on its device, outside any graph."""
    scale, zero_point = scale.detach().to(device), zero_point.detach().to(device)
    if not zero_point.is_floating_point():
        half = wide and scale.dtype in _HALF
        zero_point = _to(zero_point, torch.float32 if half else scale.dtype)
    return _expand(scale, shape), _expand(zero_point, shape)


def _like(x: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """v in dtype with the strides of torch.empty_like(x), which broadcasting may have changed."""
    return torch.empty_like(x, dtype=dtype, requires_grad=False).copy_(v)


def _before_rounding(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, q_min: int, q_max: int
) -> torch.Tensor:
    """x / scale + zero_point."""
    x = x.detach().to(first_dtype(x, q_min, q_max))
    wide = _is_wide(q_min, q_max)
    scale, zero_point = _parameters(x.shape, x.device, scale, zero_point, wide)
    return _add(_divide(x, scale), zero_point)


# ---- the operators --------------------------------------------------------------------------------


def choose_qparams_op(
    x: torch.Tensor,
    block_size: Sequence[int] | None,
    q_min: int,
    q_max: int,
    eps: float,
    symmetric: bool,
    include_zero: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale and zero_point over the whole of x (None) or over blocks (-1: the whole dimension)."""
    _checks.choose_qparams(x, block_size, q_min, q_max, eps, symmetric, include_zero)
    x = x.detach().to(first_dtype(x, q_min, q_max))

    shape = parameter_shape(x.shape, block_size)
    if x.numel() == 0:
        return x.new_empty(shape), x.new_empty(shape)
    counts = shape or [1] * x.dim()
    sizes = [n // count for n, count in zip(x.shape, counts, strict=True)]
    # Each dimension is two axes here. Torch's tensors end at 64: those of one element are left out.
    axes = [(n, i) for pair in zip(counts, sizes, strict=True) for i, n in enumerate(pair) if n > 1]
    blocks = x.reshape([n for n, _ in axes])
    within = tuple(axis for axis, (_, i) in enumerate(axes) if i == 1)

    def over_blocks(reduce, t: torch.Tensor) -> torch.Tensor:
        return (reduce(t, dim=within) if within else t).reshape(shape)

    smallest_scale = _to(torch.full((), float(eps), dtype=torch.float64, device=x.device), x.dtype)
    if symmetric:
        max_abs = over_blocks(torch.amax, blocks.abs())
        scale = torch.maximum(_divide_by_int(max_abs, max(q_max, 1)), smallest_scale)
        return scale.contiguous(), torch.zeros_like(scale).contiguous()

    x_min, x_max = over_blocks(torch.amin, blocks), over_blocks(torch.amax, blocks)
    if include_zero:
        zero = torch.zeros_like(x_min)
        x_min, x_max = torch.minimum(x_min, zero), torch.maximum(x_max, zero)
    # + 0.0: the order of a reduction decides between 0.0 and -0.0; no scale may become -0.0.
    width = (x_max + 0.0) - x_min
    scale = torch.maximum(_divide_by_int(width, max(q_max - q_min, 1)), smallest_scale)
    low = torch.full_like(x_min, q_min)
    zero_point = torch.clamp(low - torch.round(_divide(x_min, scale)), q_min, q_max)
    return scale.contiguous(), zero_point.contiguous()


def quantize_op(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    q_min: int,
    q_max: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """clip(round(x / scale + zero_point), q_min, q_max), NaN to 0, in dtype."""
    _checks.quantize(x, scale, zero_point, q_min, q_max, dtype)
    v = _before_rounding(x, scale, zero_point, q_min, q_max)
    v = torch.clamp(torch.round(v), q_min, q_max)
    v = torch.where(v.isnan(), 0.0, v)
    return _like(x, v, dtype)


def dequantize_op(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """(q - zero_point) * scale, from q as float32, in the dtype that torch's promotion gives."""
    _checks.dequantize(q, scale, zero_point)
    scale, zero_point = _parameters(q.shape, q.device, scale, zero_point, wide=True)
    v = (q.detach().to(torch.float32) - zero_point) * scale
    return _like(q, v, v.dtype)


def dynamic_quantize_op(
    x: torch.Tensor,
    block_size: Sequence[int] | None,
    q_min: int,
    q_max: int,
    eps: float,
    symmetric: bool,
    dtype: torch.dtype,
    include_zero: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """choose_qparams, then quantize with what it returned: (q, scale, zero_point)."""
    _checks.dynamic_quantize(x, block_size, q_min, q_max, eps, symmetric, dtype, include_zero)
    scale, zero_point = choose_qparams_op(x, block_size, q_min, q_max, eps, symmetric, include_zero)
    return quantize_op(x, scale, zero_point, q_min, q_max, dtype), scale, zero_point


def quantize_dequantize_op(
    x: torch.Tensor,
    block_size: Sequence[int] | None,
    q_min: int,
    q_max: int,
    eps: float,
    symmetric: bool,
    dtype: torch.dtype,
    include_zero: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dynamic_quantize, then dequantize of its q: (q, x_hat, scale, zero_point)."""
    q, scale, zero_point = dynamic_quantize_op(
        x, block_size, q_min, q_max, eps, symmetric, dtype, include_zero
    )
    return q, dequantize_op(q, scale, zero_point), scale, zero_point


def fake_quantize_op(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, q_min: int, q_max: int
) -> torch.Tensor:
    """dequantize(quantize(x)) in x's dtype (float32 for integer x); no gradient."""
    x_hat = dequantize_op(
        quantize_op(x, scale, zero_point, q_min, q_max, torch.int16), scale, zero_point
    )
    dtype = x.dtype if x.is_floating_point() else torch.float32
    return _like(x, _to(x_hat, dtype), dtype)


def fake_quantize_backward_op(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    q_min: int,
    q_max: int,
) -> torch.Tensor:
    """grad where q_min <= round(x / scale + zero_point) <= q_max, 0 elsewhere and at NaN."""
    _checks.fake_quantize_backward(grad, x, scale, zero_point, q_min, q_max)
    v = torch.round(_before_rounding(x, scale, zero_point, q_min, q_max))
    inside = (v >= q_min) & (v <= q_max)
    zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
    return _like(x, torch.where(inside, grad.detach(), zero), x.dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, q_min, q_max):
        ctx.save_for_backward(x, scale, zero_point)
        ctx.limits = q_min, q_max
        return fake_quantize_op(x, scale, zero_point, q_min, q_max)

    @staticmethod
    def backward(ctx, *grads):
        return _FakeQuantizeBackward.apply(*grads, *ctx.saved_tensors, *ctx.limits), *[None] * 4


class _FakeQuantizeBackward(torch.autograd.Function):
    """Linear in grad, so its own gradient is itself."""

    @staticmethod
    def forward(ctx, grad, x, scale, zero_point, q_min, q_max):
        ctx.save_for_backward(x, scale, zero_point)
        ctx.limits = q_min, q_max
        return fake_quantize_backward_op(grad, x, scale, zero_point, q_min, q_max)

    @staticmethod
    def backward(ctx, *grads):
        return _FakeQuantizeBackward.apply(*grads, *ctx.saved_tensors, *ctx.limits), *[None] * 5


# ---- the public functions (documented in quantkit/ops.py) -----------------------------------------


def get_symmetric_qparams(
    x: torch.Tensor, per_channel: bool = False, channel_dim: int = 0,
    dtype: torch.dtype = torch.int8, eps: float = 1e-8,
    *, block_size: _Blocks = None, q_min: int | None = None, q_max: int | None = None,
) -> QuantizationParams:  # fmt: skip
    """See :func:`quantkit.get_symmetric_qparams`."""
    blocks, q_min, q_max, eps, *_ = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, True
    )
    scale, zero_point = choose_qparams_op(x, blocks, q_min, q_max, eps, True)
    return QuantizationParams(scale, zero_point, q_min, q_max, dtype=dtype)


def get_asymmetric_qparams(
    x: torch.Tensor, per_channel: bool = False, channel_dim: int = 0,
    dtype: torch.dtype = torch.int8, eps: float = 1e-8,
    *, block_size: _Blocks = None, q_min: int | None = None, q_max: int | None = None,
    include_zero: bool = False,
) -> QuantizationParams:  # fmt: skip
    """See :func:`quantkit.get_asymmetric_qparams`."""
    blocks, q_min, q_max, eps, _, include_zero = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, False, include_zero
    )
    scale, zero_point = choose_qparams_op(x, blocks, q_min, q_max, eps, False, include_zero)
    return QuantizationParams(scale, zero_point, q_min, q_max, dtype=dtype)


def quantize_tensor(x: torch.Tensor, qparams: QuantizationParams) -> torch.Tensor:
    """See :func:`quantkit.quantize_tensor`."""
    return quantize_op(x, *unpack(qparams))


def dequantize_tensor(q: torch.Tensor, qparams: QuantizationParams) -> torch.Tensor:
    """See :func:`quantkit.dequantize_tensor`."""
    scale, zero_point, *_ = unpack(qparams)
    return dequantize_op(q, scale, zero_point)


def quantize_dequant(
    x: torch.Tensor, per_channel: bool = False, channel_dim: int = 0,
    dtype: torch.dtype = torch.int8, sym: bool = True,
    *, block_size: _Blocks = None, q_min: int | None = None, q_max: int | None = None,
    include_zero: bool = False, eps: float = 1e-8,
) -> tuple[torch.Tensor, torch.Tensor, QuantizationParams]:  # fmt: skip
    """See :func:`quantkit.quantize_dequant`."""
    blocks, q_min, q_max, eps, sym, include_zero = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, sym, include_zero
    )
    q, x_hat, scale, zero_point = quantize_dequantize_op(
        x, blocks, q_min, q_max, eps, sym, dtype, include_zero
    )
    return q, x_hat, QuantizationParams(scale, zero_point, q_min, q_max, dtype=dtype)


def dynamic_quantize(
    x: torch.Tensor, per_channel: bool = False, channel_dim: int = 0,
    dtype: torch.dtype = torch.int8, sym: bool = True,
    *, block_size: _Blocks = None, q_min: int | None = None, q_max: int | None = None,
    include_zero: bool = False, eps: float = 1e-8,
) -> tuple[torch.Tensor, QuantizationParams]:  # fmt: skip
    """See :func:`quantkit.dynamic_quantize`."""
    blocks, q_min, q_max, eps, sym, include_zero = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, sym, include_zero
    )
    q, scale, zero_point = dynamic_quantize_op(
        x, blocks, q_min, q_max, eps, sym, dtype, include_zero
    )
    return q, QuantizationParams(scale, zero_point, q_min, q_max, dtype=dtype)


def fake_quantize(x: torch.Tensor, qparams: QuantizationParams) -> torch.Tensor:
    """See :func:`quantkit.fake_quantize`."""
    scale, zero_point, q_min, q_max, _ = unpack(qparams)
    _checks.quantize(x, scale, zero_point, q_min, q_max)
    return _FakeQuantize.apply(x, scale.detach(), zero_point.detach(), q_min, q_max)
