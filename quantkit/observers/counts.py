"""Counts of numbers by the upper 16 bits of float32: negative ones first, each half by magnitude."""

from __future__ import annotations

import torch

BINS = 1 << 16
HALF = BINS // 2
_INFINITE = 0x7F80  # the bins of magnitudes from here on have no finite number
_NORMAL = 0x80  # those below have no normal one
_CHUNK = 1 << 22  # elements that are counted at a time


def counts_of(x: torch.Tensor, dim: int | None, group: int) -> torch.Tensor:
    """Those of the finite numbers of x, for each group of neighbours along dim."""
    size = 1 if dim is None else x.shape[dim]
    columns = x.reshape(-1, 1) if dim is None else x.movedim(dim, -1).reshape(-1, size)
    scales = -(-size // group)
    first = torch.arange(size, device=x.device) // group * BINS + HALF
    counts = torch.zeros(scales * BINS, dtype=torch.int64, device=x.device)
    for rows in columns.split(max(1, _CHUNK // size)):
        bins = (rows.float().contiguous().view(torch.int32) >> 16) + first
        counts += torch.bincount(bins.flatten(), minlength=scales * BINS)
    halves = counts.view(scales, 2, HALF)
    halves[..., _INFINITE:] = 0
    return halves.view(scales, BINS)


def upper_edge(negative: torch.Tensor, positive: torch.Tensor, k: int) -> float:
    """The greatest number of the bin that has the k-th smallest number, from 1 on."""
    in_order = torch.cat([negative.flip(0), positive]).cumsum(0)
    i = int(torch.searchsorted(in_order, k))
    if i >= HALF:
        return _float((i - HALF) << 16 | 0xFFFF)
    return -_float((HALF - 1 - i) << 16)


def _float(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def middles(bins: torch.Tensor) -> torch.Tensor:
    """The number that stands for those of a bin: 0 where none is normal."""
    magnitude = torch.where(bins < HALF, bins, bins - HALF)
    middle = torch.where(magnitude < _NORMAL, 0, magnitude << 16 | 0x8000)
    numbers = middle.to(torch.int32).view(torch.float32)
    return torch.where(bins < HALF, -numbers, numbers)
