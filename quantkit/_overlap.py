"""Whether tensors share memory, whatever their strides: csrc/overlap.cpp for the fallback."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class _Runs:
    """Runs of bytes, [begin, begin + run), repeated along (size, stride) of ascending strides."""

    begin: int
    run: int
    dimensions: tuple[tuple[int, int], ...] = ()

    @property
    def end(self) -> int:
        return self.begin + sum((n - 1) * stride for n, stride in self.dimensions) + self.run

    def repeated(self, size: int, stride: int) -> _Runs:
        """Along one more dimension, whose stride is not below the others'."""
        if not self.dimensions and stride <= self.run:
            return replace(self, run=self.run + (size - 1) * stride)
        return replace(self, dimensions=(*self.dimensions, (size, stride))) if size > 1 else self

    def halves(self) -> Iterator[_Runs]:
        """Two, divided in the dimension of the largest stride."""
        *others, (size, stride) = self.dimensions
        half = size // 2
        for begin, n in ((self.begin, half), (self.begin + half * stride, size - half)):
            yield replace(self, begin=begin, dimensions=tuple(others)).repeated(n, stride)


def _meet(a: _Runs, b: _Runs) -> bool:
    """Whether a byte is in both.

    Halves what is longer until spans or the strides' common divisor decide: usual layouts at the first
    look, any other in memory that does not grow with the tensors.
    """
    if a.begin >= b.end or b.begin >= a.end:
        return False
    if not a.dimensions and not b.dimensions:
        return True
    divisor = math.gcd(*(stride for _, stride in (*a.dimensions, *b.dimensions)))
    apart = (b.begin - a.begin) % divisor
    if apart >= a.run and apart + b.run <= divisor:
        return False
    if not a.dimensions or (b.dimensions and b.end - b.begin > a.end - a.begin):
        a, b = b, a
    return any(_meet(half, b) for half in a.halves())


def _ascending(t: torch.Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions with more than one element."""
    pairs = zip(t.shape, t.stride(), strict=True)
    return sorted(((n, stride) for n, stride in pairs if n > 1), key=lambda d: d[1])


def _bytes_of(t: torch.Tensor) -> _Runs:
    runs = _Runs(t.data_ptr(), t.element_size())
    for size, stride in _ascending(t):
        runs = runs.repeated(size, stride * t.element_size())
    return runs


def overlaps_itself(t: torch.Tensor) -> bool:
    """Whether two elements are at one address."""
    if t.numel() < 2:
        return False
    inner = _Runs(0, 1)  # in elements
    for size, stride in _ascending(t):
        # An element at two indices, of which this dimension's differ by one or more.
        if _meet(inner, replace(inner, begin=stride).repeated(size - 1, stride)):
            return True
        inner = inner.repeated(size, stride)
    return False


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a byte belongs to elements of both."""
    if a.device != b.device or a.numel() == 0 or b.numel() == 0:
        return False
    return _meet(_bytes_of(a), _bytes_of(b))
