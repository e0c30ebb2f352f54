"""The range and the parameters that follow from what was seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch

from .. import _checks, ops
from ..params import QuantizationParams
from .counts import HALF, middles, upper_edge

METHODS = ("minmax", "percentile", "mse")
CHOICE: dict[str, Any] = {  # what ranges depend on
    "dtype": torch.int8, "sym": True, "include_zero": True, "q_min": None, "q_max": None, "eps": None,
    "scale_rule": None,
}  # fmt: skip
_CLIPS = 100  # ranges that the search of the mean squared error tries, each 1/128 smaller


def chosen(pair: torch.Tensor, blocks: Sequence[int], **options: Any) -> QuantizationParams:
    """Parameters of extremes."""
    sym, include_zero = options.pop("sym"), options.pop("include_zero")
    given = {"block_size": blocks, "compute_dtype": torch.float32, **options}
    if sym:
        return ops.get_symmetric_qparams(pair, **given)
    if given.pop("scale_rule") is not None:
        raise ValueError("scale_rule: expected None with sym=False")
    return ops.get_asymmetric_qparams(pair, include_zero=include_zero, **given)


def clipped(
    low: torch.Tensor, high: torch.Tensor, counts: torch.Tensor, method: str, percentile: float,
    options: Mapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Limits within these extremes, by the counts of each scale."""
    number = _checks.real("percentile", percentile)
    if isinstance(number, bool) or not 0 < number <= 100:
        expected = "a number above 0, up to 100"
        raise _checks.wrong(ValueError, "percentile", expected, _checks.shown(percentile))
    part = Fraction(str(number)) / 100
    pairs: list[Sequence[float]] = []
    for row, *limits in zip(counts.cpu(), low.tolist(), high.tolist(), strict=True):
        if not row.any():
            pairs.append(limits)
        elif method == "percentile":
            pairs.append(_percentile(row, limits, part, options["sym"]))
        else:
            pairs.append(_least_error(row, limits, options))
    both = torch.tensor(pairs, dtype=torch.float32, device=low.device)
    return both[:, 0], both[:, 1]


def _percentile(
    counts: torch.Tensor, limits: Sequence[float], part: Fraction, sym: bool
) -> Sequence[float]:
    """The range that holds this part of the numbers, to the width of a bin, within the extremes."""
    low, high = limits
    negative, positive = counts[:HALF], counts[HALF:]
    n = int(counts.sum())
    if sym:
        magnitudes = negative + positive
        limit = upper_edge(torch.zeros_like(magnitudes), magnitudes, math.ceil(n * part))
        limit = min(limit, max(abs(low), abs(high)))
        return -limit, limit
    k = math.ceil(n * (1 + part) / 2)
    at_most = upper_edge(negative, positive, k)
    at_least = -upper_edge(positive, negative, k)
    return max(at_least, low), min(at_most, high)


def _least_error(
    counts: torch.Tensor, limits: Sequence[float], options: Mapping[str, Any]
) -> Sequence[float]:
    """Of the extremes times 128/128, 127/128 … those that give the least sum of squared errors.

    A bin counts as its middle. Products are single steps of float64 and sums are rounded once
    (math.fsum), so that no machine differs. Of equal sums the widest range is taken.
    """
    bins = counts.nonzero().flatten()
    numbers = middles(bins).clamp(*limits).expand(_CLIPS, -1)
    clips = (128 - torch.arange(_CLIPS, dtype=torch.float64)) / 128
    pairs = (clips[:, None] * torch.tensor(limits, dtype=torch.float64)).to(torch.float32)
    p = chosen(pairs, [1, -1], round_first=False, **options)
    errors = (ops.fake_quantize(numbers, p).double() - numbers.double()).square()
    sums = [math.fsum(row) for row in (errors * counts[bins].double()).tolist()]
    return pairs[sums.index(min(sums))].tolist()
