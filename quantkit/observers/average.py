"""Extremes for quantization-aware training, in which old batches fade."""

from __future__ import annotations

from typing import Any

import torch

from .. import _checks, _torch
from .extremes import packed, unpacked
from .observer import Observer


class MovingAverage(Observer):
    """Extremes that move towards each batch's, for the ranges of quantization-aware training.

    Weights change while it trains, so old batches must fade. The order of batches then shows in the
    result, and two averages cannot be merged: for calibration take an :class:`Observer`.
    """

    def __init__(
        self, granularity: str = "tensor", *, momentum: float = 0.01, group_size: int | None = None,
        channel_dim: int = -1,
    ) -> None:  # fmt: skip
        super().__init__(granularity, group_size=group_size, channel_dim=channel_dim, counts=False)
        if not 0 < _checks.real("momentum", momentum) <= 1:
            expected = "a number above 0, up to 1"
            raise _checks.wrong(ValueError, "momentum", expected, _checks.shown(momentum))
        self.momentum = float(momentum)

    @torch.no_grad()
    def update(self, x: torch.Tensor, group: Any = None, all_ranks: bool = False) -> None:
        """Move towards the extremes of x; with all_ranks, of all ranks of the group, the same on each."""
        if _torch.is_dtensor(x) and not all_ranks:
            raise ValueError("update: a DTensor needs all_ranks=True")
        batch = Observer(
            self.granularity, group_size=self.group_size, channel_dim=self.channel_dim, counts=False
        )
        batch.update(x)
        if all_ranks:
            batch.all_reduce(group)
        if not batch.size:
            return
        self._check_size(batch.size)
        device = batch.extremes.device
        self._begin(batch.size, batch.rank, device)
        moved = []
        both = unpacked(self.extremes.to(device)), unpacked(batch.extremes)
        for old, new in zip(*both, strict=True):
            step = torch.where(old.isfinite(), old + (new - old) * self.momentum, new)
            moved.append(torch.where(new.isfinite(), step, old))
        self.extremes = packed(*moved)
        self.seen = self.seen.to(device) + batch.seen

    def merge(self, other: Observer) -> Observer:
        raise ValueError("merge: moving averages depend on the order of batches")

    def all_reduce(self, group: Any = None) -> Observer:
        raise ValueError("all_reduce: pass all_ranks=True to update() instead")
