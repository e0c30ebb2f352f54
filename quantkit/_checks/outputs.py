"""``out=`` tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _overlap, _torch
from .values import same, tensor

_Tensors = dict[str, torch.Tensor]


def _same_elements(a: torch.Tensor, b: torch.Tensor) -> bool:
    dims = zip(a.shape, a.stride(), b.stride(), strict=True)
    strides = all(n == 1 or s == t for n, s, t in dims)  # those of size 1 lead nowhere
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and strides


def outputs(
    outs: _Tensors, results: Sequence[torch.Tensor], inputs: _Tensors, in_place: str | None
) -> None:
    """``out=`` tensors: shape, dtype and device of the result, no memory in common with anything.

    in_place names an input that an output may be, element on element.
    """
    for (name, out), result in zip(outs.items(), results, strict=True):
        tensor(name, out, None)
        same(TypeError, name, "dtype", out.dtype, result.dtype)
        same(ValueError, name, "device", out.device, result.device)
        same(ValueError, name, "shape", tuple(out.shape), tuple(result.shape))
    every = (*outs.values(), *inputs.values())
    if not any(t.device.type == "meta" or _torch.is_fake(t) for t in every):
        _overlaps(outs, inputs, in_place)
    for name, out in outs.items():
        # Its history would not be that of its values.
        if torch.is_grad_enabled() and not out.is_leaf:
            raise RuntimeError(
                f"{name}: expected a tensor outside of autograd's graphs, as out= has no gradient; "
                f"pass {name}.detach()"
            )


def _overlaps(outs: _Tensors, inputs: _Tensors, in_place: str | None) -> None:
    for name, out in outs.items():
        if _overlap.with_itself(out):
            raise ValueError(f"{name}: its elements overlap each other in memory")
    others = dict(inputs)
    for name, out in outs.items():
        for other, t in others.items():
            allowed = other == in_place and _same_elements(out, t)
            if not allowed and _overlap.between(out, t):
                raise ValueError(f"{name}: overlaps {other} in memory")
        others[name] = out


def claim(outs: _Tensors) -> None:
    """Tell autograd that ``out=`` tensors will be written; it refuses some."""
    for name, out in outs.items():
        try:
            out.copy_(out)  # stays as it is, but counts as a new version
        except RuntimeError as error:
            raise RuntimeError(f"{name}: cannot be written: {error}") from None
