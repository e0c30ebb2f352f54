"""Blocks that share parameters, and the two kinds of steps from numbers to codes (docs/numerics.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from . import _checks, philox
from .formats import HALF_DTYPES, Format, rounded, scale_numbers
from .schemes import Over

_Tensor = torch.Tensor
_Blocks = Sequence[int] | None


# ---- blocks -----------------------------------------------------------------------------------------


def parameter_shape(shape: Sequence[int], block_size: _Blocks) -> list[int]:
    """The shape of scale and zero_point: how many blocks each dimension has; 0-dim for None."""
    if block_size is None:
        return []
    return [_checks.blocks_in(n, b) for n, b in zip(shape, block_size, strict=True)]


def expand(p: _Tensor, shape: Sequence[int], block_size: _Blocks = None) -> _Tensor:
    """A parameter over blocks, repeated until it broadcasts; its rank stays.

    block_size is needed where the last block of a dimension is short.
    """
    if p.dim() == len(shape):
        for dim, (size, whole) in enumerate(zip(p.shape, shape, strict=True)):
            if size not in (0, 1, whole):
                block = whole // size
                if block_size is not None and whole % block_size[dim] != 0:
                    block = block_size[dim]
                p = p.repeat_interleave(block, dim).narrow(dim, 0, whole)
    return p


def in_blocks(x: _Tensor, block_size: _Blocks, filled: bool = False) -> tuple[_Tensor, Over]:
    """x, which has elements, with axes of its own for each block, and the reduction over these.

    A short last block has its last element once more and more, or zeros where filled.
    """
    shape = parameter_shape(x.shape, block_size)
    counts = shape or [1] * x.dim()
    sizes = [
        n if b == -1 else min(b, n) for n, b in zip(x.shape, block_size or x.shape, strict=True)
    ]
    for dim, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        if filled and count * size != x.shape[dim]:
            sides = [0] * (2 * (x.dim() - dim))
            sides[-1] = count * size - x.shape[dim]
            x = torch.nn.functional.pad(x, sides)
        elif count * size != x.shape[dim]:
            whole = torch.arange(count * size, device=x.device).clamp(max=x.shape[dim] - 1)
            x = x.index_select(dim, whole)
    # Each dimension is two axes here. Torch's tensors end at 64: those of one element are left out.
    axes = [(n, i) for pair in zip(counts, sizes, strict=True) for i, n in enumerate(pair) if n > 1]
    within = tuple(axis for axis, (_, i) in enumerate(axes) if i == 1)

    def over(reduce: Callable[..., _Tensor], t: _Tensor) -> _Tensor:
        return (reduce(t, dim=within) if within else t).reshape(shape)

    return x.reshape([n for n, _ in axes]), over


# ---- version 1's steps ------------------------------------------------------------------------------


def _is_wide(q_min: int, q_max: int) -> bool:
    """Whether half precision cannot hold the limits (possible with int16 only)."""
    return q_min < -128 or q_max > 255


def first_dtype(x: _Tensor, q_min: int, q_max: int) -> torch.dtype:
    """The dtype that x takes before the first step."""
    if not x.is_floating_point() or (x.dtype in HALF_DTYPES and _is_wide(q_min, q_max)):
        return torch.float32
    return x.dtype


def parameters(x: _Tensor, scale: _Tensor, zero_point: _Tensor, wide: bool) -> tuple[_Tensor, ...]:
    """scale and zero_point as floats that broadcast to x's shape, on its device, outside any graph."""
    scale, zero_point = scale.detach().to(x.device), zero_point.detach().to(x.device)
    if not zero_point.is_floating_point():
        half = wide and scale.dtype in HALF_DTYPES
        zero_point = rounded(zero_point, torch.float32 if half else scale.dtype)
    return expand(scale, x.shape), expand(zero_point, x.shape)


def _takes_scalar(t: _Tensor, parameter: _Tensor) -> bool:
    """Half precision with dimensions keeps its dtype beside a 0-dim parameter."""
    return t.dtype in HALF_DTYPES and t.dim() > 0 and parameter.dim() == 0


def _divide(x: _Tensor, scale: _Tensor) -> _Tensor:
    if _takes_scalar(x, scale):  # the quotient of the full scale, rounded once
        return (x.to(torch.float32) / scale.to(torch.float32)).to(x.dtype)
    return x / scale


def _add(v: _Tensor, zero_point: _Tensor) -> _Tensor:
    if _takes_scalar(v, zero_point):  # the zero point rounded first
        return v + rounded(zero_point, v.dtype)
    return v + zero_point


def before_rounding(
    x: _Tensor, scale: _Tensor, zero_point: _Tensor, q_min: int, q_max: int
) -> _Tensor:
    """x / scale + zero_point."""
    x = x.detach().to(first_dtype(x, q_min, q_max))
    scale, zero_point = parameters(x, scale, zero_point, _is_wide(q_min, q_max))
    return _add(_divide(x, scale), zero_point)


# ---- float32 steps ----------------------------------------------------------------------------------


def spread_global(
    global_scale: _Tensor | None, device: torch.device, shape: Sequence[int]
) -> _Tensor | None:
    """A global scale in float32, repeated until it broadcasts to the shape of scale."""
    if global_scale is None:
        return None
    return expand(global_scale.detach().to(device).to(torch.float32), shape)


class Float32Steps:
    """Parameters in float32 on a device, repeated until they broadcast to a shape."""

    def __init__(
        self, device: torch.device, shape: Sequence[int], scale: _Tensor,
        zero_point: _Tensor | None, block_size: _Blocks, global_scale: _Tensor | None,
    ):  # fmt: skip
        scale = scale_numbers(scale.detach().to(device))
        whole = spread_global(global_scale, device, scale.shape)
        self.scale = expand(scale if whole is None else scale * whole, shape, block_size)
        self.zero_point = None
        if zero_point is not None:
            zero_point = zero_point.detach().to(device).to(torch.float32)
            self.zero_point = expand(zero_point, shape, block_size)

    def there(self, x: _Tensor, round_first: bool) -> _Tensor:
        """What becomes a code: x / scale + zero_point; round(x / scale) + zero_point with round_first."""
        v = x.detach().to(torch.float32) / self.scale
        if round_first:
            v = torch.round(v)
        return v if self.zero_point is None else v + self.zero_point

    def back(self, numbers: _Tensor) -> _Tensor:
        """(number - zero_point) * scale."""
        v = numbers if self.zero_point is None else numbers - self.zero_point
        return v * self.scale

    def coded(
        self, x: _Tensor, f: Format, q_min: int, q_max: int, round_first: bool,
        u: _Tensor | None = None,
    ) -> tuple[_Tensor, _Tensor, _Tensor]:  # fmt: skip
        """What becomes a code, whether it is within the limits, and the code's number."""
        v = self.there(x, round_first)
        clipped_as_it_is = round_first or u is not None
        inside = (v >= q_min) & (v <= q_max) if clipped_as_it_is else f.is_inside(v, q_min, q_max)
        return v, inside, f.decode(f.encode(v, q_min, q_max, u))


def draws(x: _Tensor, seed: _Tensor | None, index: Sequence[int] | None) -> _Tensor | None:
    """A random number in (0, 1) for each element, where a seed asks for it."""
    return None if seed is None else philox.uniform(seed.to(x.device), x.shape, index)
