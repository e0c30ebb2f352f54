"""Extremes as integers: their maxima join them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import ops


def _keys(numbers: torch.Tensor) -> torch.Tensor:
    """int32 that sort as float32 do, -0.0 below 0.0; of keys the bits of the numbers."""
    bits = numbers.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def packed(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Two rows of integers whose maximum joins extremes."""
    return torch.stack([~_keys(low), _keys(high)])


def unpacked(extremes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The minima and the maxima again."""
    low, high = (_keys(keys).view(torch.float32) for keys in (~extremes[0], extremes[1]))
    return low, high


def extremes_of(x: torch.Tensor, blocks: Sequence[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the finite numbers of x, packed, and what was seen."""
    low, high = (t.float().flatten() for t in ops.aminmax(x, block_size=blocks))
    lost = torch.zeros(3, dtype=torch.int64, device=x.device)
    if not bool((low.isfinite() & high.isfinite()).all()):
        is_finite = x.isfinite()
        low = ops.aminmax(torch.where(is_finite, x, math.inf), block_size=blocks)[0]
        high = ops.aminmax(torch.where(is_finite, x, -math.inf), block_size=blocks)[1]
        low, high = low.float().flatten(), high.float().flatten()
        lost = torch.stack([x.isnan().sum(), (x == math.inf).sum(), (x == -math.inf).sum()])
    finite = x.numel() - lost.sum()
    return packed(low, high), torch.cat([finite.view(1), lost])
