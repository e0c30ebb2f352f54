"""The gradients of fake_quantize's parameters: learned step size quantization (docs/numerics.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import _checks, sums
from .formats import OF_NAME, WIDEST
from .steps import Float32Steps, before_rounding, draws, in_blocks, parameter_shape

_Tensor = torch.Tensor
_Blocks = Sequence[int] | None


class _Learning:
    """fake_quantize once more, by either overload, for what its parameters' gradients are made of."""

    def __init__(
        self, x: _Tensor, scale: _Tensor, zero_point: _Tensor | None, q_min: int, q_max: int,
        format: str | None = None, *, block_size: _Blocks = None,
        global_scale: _Tensor | None = None, seed: _Tensor | None = None,
        index: Sequence[int] | None = None, round_first: bool = False,
    ):  # fmt: skip
        self.x, self.block_size = x.detach().to(torch.float32), block_size
        # The quotient and the product are float32 ones in version 1's steps too.
        steps = Float32Steps(x.device, x.shape, scale, zero_point, block_size, global_scale)
        self.scale, self.zero_point = steps.scale, steps.zero_point
        if format is None:
            assert zero_point is not None
            v = before_rounding(x, scale, zero_point, q_min, q_max)
            self.inside = (torch.round(v) >= q_min) & (torch.round(v) <= q_max)
            self.numbers = WIDEST.decode(WIDEST.encode(v, q_min, q_max))
        else:
            u = draws(x, seed, index)
            v, self.inside, self.numbers = steps.coded(
                x, OF_NAME[format], q_min, q_max, round_first, u
            )
        self.kept = ~torch.isnan(v)

    def summed(self, terms: _Tensor, p: _Tensor) -> _Tensor:
        """The exact sum of float64 terms over the elements that share each number of p, in p's dtype."""
        if terms.numel() == 0:
            return torch.zeros_like(p, memory_format=torch.contiguous_format)
        blocks: list[int] | None = None
        if p.dim() > 0:
            shape, blocks = [1] * (terms.dim() - p.dim()) + list(p.shape), []
            for dim, (size, whole) in enumerate(zip(shape, terms.shape, strict=True)):
                block = whole // size
                if self.block_size is not None and size not in (1, whole):
                    block = self.block_size[dim]
                blocks.append(block)
        terms, over = in_blocks(torch.where(self.kept, terms, 0.0), blocks, filled=True)
        dtype = p.dtype if p.is_floating_point() else torch.float32
        made = sums.of_terms(terms, parameter_shape(self.x.shape, blocks), over, dtype)
        return made.reshape(p.shape).contiguous().to(p.device)


def scale_gradient_op(grad: _Tensor, *given: Any, **options: Any) -> _Tensor:
    """The sum of grad · ((number - zero_point) - x / scale) inside the limits, and outside of

    grad · (number - zero_point): learned step size quantization (Esser et al., 2020). Products are exact.
    """
    _checks.parameter_gradient(grad, *given, **options)
    at = _Learning(*given, **options)
    d = at.numbers if at.zero_point is None else at.numbers - at.zero_point
    d = d - torch.where(at.inside, at.x / at.scale, 0)
    terms = grad.detach().to(torch.float32).to(torch.float64) * d.to(torch.float64)
    return at.summed(terms, given[1])


def zero_point_gradient_op(grad: _Tensor, *given: Any, **options: Any) -> _Tensor:
    """The sum of -(grad · scale) outside the limits."""
    _checks.parameter_gradient(grad, *given, **options)
    at = _Learning(*given, **options)
    terms = -(grad.detach().to(torch.float32) * at.scale)
    return at.summed(torch.where(at.inside, 0.0, terms.to(torch.float64)), given[2])
