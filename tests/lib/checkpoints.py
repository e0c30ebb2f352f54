"""Weights for tests, and what a file holds for them by each scheme, whole or by tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

import quantkit
from quantkit.checkpoint.layouts import SCHEMES, WeightScheme


def of(name: str, **changes) -> WeightScheme:
    return replace(SCHEMES[name], **changes)


#: Each scheme, and what a file of rules makes of them.
ALL = {
    **SCHEMES,
    "w8a8 tensor": of("w8a8", block=None),
    "w8a8 group": of("w8a8", block=(1, 32)),
    "w8a8 asymmetric": of("w8a8", symmetric=False),
    "w8a8 tensor asymmetric": of("w8a8", block=None, symmetric=False),
    "w8 asymmetric": of("w8", symmetric=False),
    "w8 weights alone": of("w8a8", activations=False),
    "w8 group": of("w8", block=(1, 64)),
    "w4 with inputs": of("w4", activations=True),
    "w4 channel": of("w4", block=(1, -1)),
    "w4 half range": of("w4", scale_rule="half_range"),
    "w4 asymmetric": of("w4", symmetric=False),
    "w4 channel asymmetric": of("w4", block=(1, -1), symmetric=False),
    "fp8 tensor": of("fp8", block=None),
    "fp8 weights alone": of("fp8", activations=False),
    "fp8 blocks": of("fp8", block=(128, 128)),
    "mxfp8 weights alone": of("mxfp8", activations=False),
    "mxfp4 both": of("mxfp4", activations=True),
    **{
        f"own {name}": replace(s, layout="quantkit", activations=False)
        for name, s in SCHEMES.items()
    },
    "own uint4": WeightScheme("custom", "uint4", "quantkit", (1, 32), symmetric=False),
    "own uint8 tensor": WeightScheme("custom", "uint8", "quantkit", None, symmetric=False),
    "own int2 blocks": WeightScheme("custom", "int2", "quantkit", (16, 16), scale="float32"),
}


def weight(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers whose rows and columns differ in size."""
    made = torch.Generator().manual_seed(seed)
    x = 0.02 * torch.randn(shape, generator=made)
    sizes = torch.exp(torch.randn(shape[0], 1, generator=made))
    return (x * sizes).to(dtype)


def quantized(scheme: WeightScheme, x: torch.Tensor):
    """The whole weight in one tile."""
    return scheme.quantize(x, quantkit.aminmax(x) if scheme.whole else None)


def stored(scheme: WeightScheme, name: str, x: torch.Tensor, rows: int | None = None):
    """The tensors of a file for a weight that is quantized in tiles of about so many rows."""
    shape, dtype = tuple(x.shape), x.dtype
    parts = {p.name: p for p in scheme.parts(name, shape, dtype)}
    sizes = {n: math.prod(p.shape) * p.dtype.itemsize for n, p in parts.items()}
    files = {n: torch.full((size,), 0xEE, dtype=torch.uint8) for n, size in sizes.items()}
    extremes = quantkit.aminmax(x) if scheme.whole else None
    for first, count in tiles(scheme, shape[0], rows):
        q, p = scheme.quantize(x[first : first + count], extremes)
        for part, offset, data in scheme.stored(name, q, p, first, shape, dtype):
            files[part][offset : offset + len(data)] = data
    return {n: files[n].view(p.dtype).view(p.shape) for n, p in parts.items()}


def tiles(scheme: WeightScheme, n: int, rows: int | None) -> Iterator[tuple[int, int]]:
    """(first, count) of tiles that begin where the scheme lets them."""
    step = n if rows is None else -(-rows // scheme.rows) * scheme.rows
    for first in range(0, n, step):
        yield first, min(step, n - first)
