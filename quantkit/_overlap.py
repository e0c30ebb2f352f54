"""Whether tensors share memory: exact, in memory bounded by the elements of the smaller tensor.

``csrc/torch/overlap.cpp`` does the same. Elements of a tensor lie at sums of its strides, each taken
from 0 to size - 1 times, so two tensors meet where some sum of the strides of both lies between two
bounds. A search over the strides, largest first, decides that at once for all usual layouts. Where it
does not (the question is NP-hard), the addresses of the smaller tensor are sorted and the other's looked
up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

_STEPS = 2000  # of a search, before it is cheaper to sort
_CHUNK = 1 << 20  # addresses at once
_Term = tuple[int, int]  # a stride, and how often it may be taken


def with_itself(t: torch.Tensor) -> bool:
    """Whether two elements of t share memory."""
    if t.numel() < 2:
        return False
    terms = _terms(t, 1)
    if any(stride == 0 for stride, _ in terms):
        return True
    if t.numel() > _reach(terms) + 1:  # more elements than places
        return True
    terms.sort(reverse=True)
    try:
        # Two index tuples that first differ, in this order, by at least one times a stride.
        for i, (stride, most) in enumerate(terms):
            rest = terms[i + 1 :]
            target = _reach(rest) - stride
            if _some_sum([(stride, most - 1), *((s, 2 * m) for s, m in rest)], target, target):
                return True
        return False
    except _TooLongError:
        places, _ = _addresses(t, 0, t.numel()).sort()
        return bool((places[1:] == places[:-1]).any())


def between(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether an element of a and one of b share memory."""
    if a.device != b.device or a.numel() == 0 or b.numel() == 0:
        return False
    if a.numel() > b.numel():
        a, b = b, a
    a_size, b_size = a.element_size(), b.element_size()
    a_terms, b_terms = _terms(a, a_size), _terms(b, b_size)
    # Elements meet where -b_size < a's address - b's < a_size, turned so that all strides add.
    ahead = b.data_ptr() + _reach(b_terms) - a.data_ptr()
    low, high = ahead - a_size + 1, ahead + b_size - 1
    if high < 0 or low > _reach(a_terms) + _reach(b_terms):
        return False
    merged: dict[int, int] = {}
    for stride, most in a_terms + b_terms:
        if stride:
            merged[stride] = merged.get(stride, 0) + most
    try:
        return _some_sum(sorted(merged.items(), reverse=True), low, high)
    except _TooLongError:
        places, _ = (_addresses(a, 0, a.numel()) * a_size + a.data_ptr()).sort()
        return any(
            _any_meets(places, a_size, at * b_size + b.data_ptr(), b_size)
            for begin in range(0, b.numel(), _CHUNK)
            for at in [_addresses(b, begin, min(begin + _CHUNK, b.numel()))]
        )


class _TooLongError(Exception):
    pass


def _terms(t: torch.Tensor, unit: int) -> list[_Term]:
    return [(s * unit, n - 1) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1]


def _reach(terms: Iterable[_Term]) -> int:
    return sum(stride * most for stride, most in terms)


def _some_sum(terms: list[_Term], low: int, high: int) -> bool:
    """Whether some sum of the strides, each taken so often at most, lies in [low, high]."""
    # Of the terms from each on: their reach, their common divisor, and whether no multiple of it is left
    # out between 0 and their reach.
    suffixes = [(0, 0, True)]
    for stride, most in reversed(terms):
        reach, divisor, full = suffixes[-1]
        common = math.gcd(divisor, stride)
        full = full and (divisor == 0 or (divisor == common and stride <= reach + divisor))
        suffixes.append((reach + stride * most, common, full))
    suffixes.reverse()
    steps = 0

    def search(i: int, low: int, high: int) -> bool:
        nonlocal steps
        steps += 1
        if steps > _STEPS:
            raise _TooLongError
        reach, divisor, full = suffixes[i]
        low, high = max(low, 0), min(high, reach)
        if low > high:
            return False
        if low == 0 or high == reach:
            return True
        if high // divisor * divisor < low:
            return False
        if full:
            return True
        stride, most = terms[i]
        first, last = -((suffixes[i + 1][0] - low) // stride), min(most, high // stride)
        return any(
            search(i + 1, low - k * stride, high - k * stride)
            for k in range(max(first, 0), last + 1)
        )

    return search(0, low, high)


def _addresses(t: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """The places of elements begin to end, counted in elements from the first."""
    index = torch.arange(begin, end, device="cpu")
    at = torch.zeros_like(index)
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        at += index % size * stride
        index //= size
    return at


def _any_meets(places: torch.Tensor, size: int, at: torch.Tensor, at_size: int) -> bool:
    """Whether one of the sorted places and one of at are less than an element apart."""
    first = torch.searchsorted(places, at - size, right=True).clamp_(max=len(places) - 1)
    near = places[first]
    return bool(((near > at - size) & (near < at + at_size)).any())
