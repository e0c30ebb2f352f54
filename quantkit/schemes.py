"""How scale and zero_point are chosen from the numbers that share them (docs/numerics.md, section 2).

A scheme gets the tensor, a reduction over what shares a scale, the limits and the smallest scale. A new
scale rule stands beside `_scale`, a new scheme beside the two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .formats import HALF_DTYPES, rounded

# over(torch.amax, t): the maximum of t over each block, in the shape of scale
Over = Callable[[Callable[..., torch.Tensor], torch.Tensor], torch.Tensor]
Chosen = tuple[torch.Tensor, torch.Tensor]


def _scale(width: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """width / steps, raised to eps."""
    # A true division on every device: by a tensor, never by a number (CUDA would multiply by 1 / n).
    wide = torch.float32 if width.dtype in HALF_DTYPES else width.dtype
    divisor = torch.full((), max(steps, 1), dtype=wide, device=width.device)
    smallest = torch.full((), float(eps), dtype=torch.float64, device=width.device)
    scale = (width.to(wide) / divisor).to(width.dtype)
    return torch.maximum(scale, rounded(smallest, width.dtype))


def symmetric(
    x: torch.Tensor, over: Over, q_min: int, q_max: int, eps: float, include_zero: bool
) -> Chosen:
    """max |x| becomes q_max."""
    scale = _scale(over(torch.amax, x.abs()), q_max, eps)
    return scale, torch.zeros_like(scale)


def asymmetric(
    x: torch.Tensor, over: Over, q_min: int, q_max: int, eps: float, include_zero: bool
) -> Chosen:
    """min x becomes q_min, and max x q_max."""
    x_min, x_max = over(torch.amin, x), over(torch.amax, x)
    if include_zero:
        zero = torch.zeros_like(x_min)
        x_min, x_max = torch.minimum(x_min, zero), torch.maximum(x_max, zero)
    # + 0.0: the order of a reduction decides between 0.0 and -0.0; no scale may become -0.0.
    scale = _scale((x_max + 0.0) - x_min, q_max - q_min, eps)
    low = torch.full_like(x_min, q_min)
    return scale, torch.clamp(low - torch.round(x_min / scale), q_min, q_max)
