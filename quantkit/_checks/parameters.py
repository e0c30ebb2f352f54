"""Limits, and the tensors of parameters against the tensor that they belong to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from ..formats import E8M0, FORMATS, WIDEST, Format
from .sizes import blocks, blocks_in, broadcast, fits, has_short_block, surely
from .values import FLOATING, SCALE, flag, integer, shown, shown_sizes, tensor, wrong


def keywords(name: str, given: Iterable[object], valid: Sequence[str]) -> None:
    """The keys of a scheme, or of what overrides it."""
    for key in given:
        if key not in valid:
            raise wrong(TypeError, name, f"keys among {', '.join(valid)}", shown(key))


def one_granularity(
    scheme: object, options: Collection[str], block_size: Sequence[int], per_channel: Any
) -> None:
    """Of block_size and per_channel=True one must not be the scheme's and the other an option."""
    given = [name for name in ("block_size", "per_channel") if name in options]
    if len(given) != 1 or not flag("per_channel", per_channel):
        return
    whose = f"scheme {scheme}" if isinstance(scheme, str) else "the scheme"
    if given == ["per_channel"]:
        its, without = f"block_size {shown_sizes(list(block_size))}", "block_size=None"
    else:
        its, without = "per_channel=True", "per_channel=False"
    raise ValueError(f"{given[0]}: {whose} has {its}; pass {without} as well to replace that")


def q_range(q_min: int, q_max: int, f: Format = WIDEST, name: object = None) -> None:
    """The limits of codes against their format, whose name in the error is its dtype."""
    q_min, q_max = integer("q_min", q_min), integer("q_max", q_max)
    if f.holds(q_min, q_max):
        return
    if not f.has_zero_point:
        expected = (
            f"-n and n, n a positive integer that is a number of {name or f.dtype} up to {f.high}"
        )
        raise wrong(ValueError, "q_min, q_max", expected, shown_sizes([q_min, q_max]))
    if q_min > q_max:
        raise wrong(
            ValueError, "q_min, q_max", "q_min <= q_max", f"{shown(q_min)} > {shown(q_max)}"
        )
    raise ValueError(
        f"q_min, q_max: {shown_sizes([q_min, q_max])} is outside the limits "
        f"[{f.low}, {f.high}] of {name or f.dtype}"
    )


_INTEGERS = tuple(f for f in FORMATS if f.has_zero_point)


def smallest_format(q_min: int, q_max: int) -> Format:
    """Of parameters that name no dtype: the first of version 1's that holds the limits."""
    q_min, q_max = integer("q_min", q_min), integer("q_max", q_max)
    f = next((f for f in _INTEGERS if f.holds(q_min, q_max)), WIDEST)
    if f is WIDEST:
        q_range(q_min, q_max)
    if f.number is None:
        limits = shown_sizes([q_min, q_max])
        raise wrong(ValueError, "dtype", f"{f.dtype} for q_min, q_max of {limits}", None)
    return f


def on_the_device(name: str, p: torch.Tensor, x_name: str, x: torch.Tensor) -> None:
    if p.device != x.device and not (p.dim() == 0 and p.device.type == "cpu"):
        raise wrong(RuntimeError, name, f"device {x.device}, that of {x_name}", p.device)


def _fits_shape(name: str, p: torch.Tensor, x_name: str, shape: Sequence[int]) -> None:
    if not fits(p.shape, shape):
        raise ValueError(
            f"{name}: shape {tuple(p.shape)} does not fit {x_name} of shape {tuple(shape)}: "
            f"every size must divide {x_name}'s, or the shape broadcast to {x_name}'s"
        )


def _fit_each_other(scale: torch.Tensor, zero_point: torch.Tensor) -> None:
    if not broadcast(scale.shape, zero_point.shape):
        raise ValueError(
            f"scale, zero_point: shapes {tuple(scale.shape)} and {tuple(zero_point.shape)} "
            "do not broadcast with each other"
        )


def parameters(x_name: str, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
    """scale and zero_point against the tensor they belong to: kind, device, shape."""
    tensor(x_name, x)
    tensor("scale", scale, FLOATING)
    tensor("zero_point", zero_point)
    for name, p in (("scale", scale), ("zero_point", zero_point)):
        on_the_device(name, p, x_name, x)
        _fits_shape(name, p, x_name, x.shape)
    _fit_each_other(scale, zero_point)


def format_parameters(
    x_name: str, x: torch.Tensor, shape: Sequence[int], f: Format, scale: torch.Tensor,
    zero_point: torch.Tensor | None, block_size: Sequence[int] | None,
    global_scale: torch.Tensor | None,
) -> None:  # fmt: skip
    """The same of a ``.format`` operator, by the shape of the elements that x, or q, stands for."""
    tensor("scale", scale, SCALE)
    given = {"scale": scale}
    if zero_point is not None:
        if not f.has_zero_point:
            raise wrong(ValueError, "zero_point", f"None for {f.name}", type(zero_point).__name__)
        tensor("zero_point", zero_point)
        given["zero_point"] = zero_point
    for name, p in given.items():
        on_the_device(name, p, x_name, x)
    if block_size is not None:
        blocks(block_size, shape, x_name, short=True)
        block_parameter("scale", scale, shape, block_size, x_name)
    else:
        _fits_shape("scale", scale, x_name, shape)
    if global_scale is not None:
        if scale.dtype == E8M0:
            raise ValueError(f"global_scale: {E8M0} scales take none")
        global_parameter(global_scale, x_name, x, scale.shape)
    if zero_point is None or (block_size is not None and _fits_scale(scale, zero_point)):
        return
    if block_size is not None and has_short_block(shape, block_size):
        expected = f"sizes of 1 or those of scale of shape {tuple(scale.shape)} beside short blocks"
        raise wrong(ValueError, "zero_point", expected, tuple(zero_point.shape))
    _fits_shape("zero_point", zero_point, x_name, shape)
    _fit_each_other(scale, zero_point)


def global_parameter(
    global_scale: torch.Tensor, x_name: str, x: torch.Tensor, scale_shape: Sequence[int]
) -> None:
    """A scale of scales: 0-dim, or of scale's rank with sizes that divide scale's."""
    tensor("global_scale", global_scale, FLOATING)
    on_the_device("global_scale", global_scale, x_name, x)
    rank = global_scale.dim()
    if rank not in (0, len(scale_shape)) or not fits(global_scale.shape, scale_shape):
        raise ValueError(
            f"global_scale: shape {tuple(global_scale.shape)} does not fit scale of shape "
            f"{tuple(scale_shape)}: expected no dimension, or sizes that divide scale's"
        )


def _fits_scale(scale: torch.Tensor, zero_point: torch.Tensor) -> bool:
    """Whether each size is 1 or scale's; also without dimensions."""
    if zero_point.dim() not in (0, scale.dim()):
        return False
    pairs = zip(zero_point.shape, scale.shape, strict=False)
    return not any(surely((z != 1) & (z != s)) for z, s in pairs)


def block_parameter(
    name: str, p: torch.Tensor, shape: Sequence[int], block_size: Sequence[int], x_name: str = "x"
) -> None:
    """A parameter of x's rank: one for each block."""
    expected = [blocks_in(n, b) for n, b in zip(shape, block_size, strict=True)]
    if p.dim() != len(expected) or any(
        surely(a != b) for a, b in zip(p.shape, expected, strict=True)
    ):
        raise ValueError(
            f"{name}: shape {tuple(p.shape)} does not fit {x_name} of shape {tuple(shape)} and "
            f"block_size {shown_sizes(list(block_size))}: expected {tuple(expected)}"
        )
