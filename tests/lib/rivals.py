"""What the tests of tests/rivals share: inputs of 524,288 numbers, and the comparison with its record.

Inputs are made of integers, so every torch and every machine makes the same, and so are the counts of
what differs.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
ROWS, COLUMNS = 512, 1024
DTYPES = (torch.float32, torch.bfloat16)


# ---- inputs -----------------------------------------------------------------------------------------


def bits(seed: int, n: int) -> torch.Tensor:
    """n integers of 32 random bits (the finalizer of MurmurHash3 over a counter)."""
    h = (torch.arange(n) + seed * 0x9E3779B1) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return h ^ (h >> 16)


def bell(seed: int, *shape: int) -> torch.Tensor:
    """Sums of four uniform numbers in steps of 2^-15: mean 0, deviation 1.15."""
    n = math.prod(shape)
    total = sum(bits(4 * seed + k, n) >> 16 for k in range(4))
    return ((total - 131070).to(torch.float32) / 2**15).view(shape)


def powers(seed: int, low: int, high: int, *shape: int) -> torch.Tensor:
    """2^low ... 2^(high - 1)."""
    exponent = low + bits(seed, math.prod(shape)) % (high - low)
    return torch.ldexp(torch.ones(exponent.shape), exponent).view(shape)


def factors(seed: int, low: int, high: int, *shape: int) -> torch.Tensor:
    """Numbers of 24 bits in [2^low, 2^high)."""
    mantissa = 1 + (bits(seed, math.prod(shape)) & 0x7FFFFF).to(torch.float32) / 2**23
    return mantissa.view(shape) * powers(seed + 1, low, high, *shape)


def half_steps(seed: int, reach: int, *shape: int) -> torch.Tensor:
    """n and n + 1/2, |n| up to reach; some are -0.0."""
    steps = bits(seed, math.prod(shape)) % (4 * reach + 1) - 2 * reach
    numbers = steps.to(torch.float32) / 2
    return torch.where((steps == 0) & (bits(seed + 1, steps.numel()) % 2 == 0), -0.0, numbers).view(
        shape
    )


def chosen(dtype: torch.dtype, largest: float, block: int = COLUMNS) -> torch.Tensor:
    """524,288 numbers from which scales are chosen.

    In every second block max |x| is largest · 2^k, so that max |x| / largest is a power of two, and the
    other numbers are whole and half steps of it. In every fourth they are so of a number of 24 bits:
    x / scale and x · (1 / scale) then round to both sides of ties. The rest are sums of uniform numbers.
    """
    blocks = ROWS * COLUMNS // block
    steps = half_steps(1, int(largest), blocks, block)
    steps[:, 0] = largest
    steps[1::4] = steps[1::4].neg()
    number = torch.arange(blocks).view(-1, 1)
    unit = torch.where(number % 2 == 0, powers(3, -12, 8, blocks, 1), factors(5, -12, 8, blocks, 1))
    x = torch.where(number % 4 == 3, bell(4, blocks, block), steps) * unit
    return x.view(ROWS, COLUMNS).to(dtype)


class Given(NamedTuple):
    x: torch.Tensor
    scale: torch.Tensor  # (rows, 1), float32
    zero_point: torch.Tensor  # (rows, 1), int32; zeros where there is none


def given(
    dtype: torch.dtype, low: int, high: int, zero_points: bool = True, nan: bool = False, rows=ROWS
) -> Given:
    """Numbers beside a scale and a zero point of each row: half steps, also beyond the limits, signed
    zeros, sums of uniform numbers, tiny and huge ones, infinities; NaN on request."""
    n = rows * COLUMNS
    row = torch.arange(rows).view(-1, 1)
    scale = torch.where(row % 4 == 0, powers(7, -8, 4, rows, 1), factors(8, -8, 4, rows, 1))
    zero_point = low + bits(10, rows).view(-1, 1) % (high - low + 1)
    zero_point = torch.where(row % 8 == 1, 0, zero_point) if zero_points else zero_point * 0
    width = high - low
    steps = half_steps(11, width, rows, COLUMNS)
    rest = bell(13, rows, COLUMNS) * (width / 2)
    x = torch.where((bits(14, n) % 2 == 0).view(rows, -1), steps, rest) * scale
    special = [0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, math.inf, -math.inf, 3.3e38, -3.3e38]
    x[:, : len(special)] = torch.tensor(special)
    if nan:
        x[::3, len(special)] = math.nan
    return Given(x.to(dtype), scale, zero_point.to(torch.int32))


# ---- what differs ----------------------------------------------------------------------------------

DIFFERING: dict[str, dict[str, int]] = {
    "torchao NVFP4, two levels": {"bfloat16, codes": 13_697},
    "torchao NVFP4, one level": {"bfloat16, codes": 227},
    "compressed-tensors MXFP8": {"bfloat16, scale": 37, "bfloat16, codes": 1_175},
    "compressed-tensors NVFP4": {
        "float32, scale": 9_798,
        "bfloat16, scale": 9_910,
        "bfloat16, codes": 557,
    },
    "compressed-tensors int8, symmetric": {
        "bfloat16, scale": 254,
        "bfloat16, codes, compute_dtype=torch.float32": 39_418,
    },
    "compressed-tensors int8, asymmetric": {"bfloat16, codes, compute_dtype=torch.float32": 72_155},
    "compressed-tensors int4, pack-quantized": {
        "bfloat16, scale": 1_914,
        "bfloat16, words of 8 codes": 9_605,
    },
    "compressed-tensors float8": {"bfloat16, scale": 222, "bfloat16, codes": 13_165},
    "FBGEMM fused 8-bit rowwise": {
        "float32, codes, (x - min) · (255 / (max - min + 1e-8))": 3,
        "float32, codes, (x - min) / scale": 20,
    },
    "DeepGEMM per_token_cast_to_fp8": {"float32, codes": 3_029, "bfloat16, codes": 258},
    "TransformerEngine float8, current and block scaling": {
        "float32, scale (1 / factor)": 580,
        "float32, codes": 4_265,
        "bfloat16, scale (1 / factor)": 676,
        "bfloat16, codes": 144,
    },
    "vLLM float8, given scale": {"float32, codes": 3_683, "bfloat16, codes": 184},
    "vLLM int8, per token": {"float32, codes": 13_597, "bfloat16, codes": 179},
    "gguf Q8_0": {"float32, codes": 93_603},
    "optimum-quanto qfloat8_e4m3fn": {"bfloat16, scale": 222, "bfloat16, codes": 13_165},
    "optimum-quanto qint4, float shift": {"bfloat16, codes": 22_477},
    "optimum-quanto qint4, zero point": {"bfloat16, codes": 952},
    "torch fake_quantize_per_tensor_affine": {
        "float32 → int8 and back": 6_535,
        "float32 → uint8 and back": 6_465,
    },
    "torch fake_quantize_per_channel_affine": {
        "float32 → int8 and back": 6_535,
        "float32 → uint8 and back": 6_465,
    },
    "torch quantized_decomposed.quantize_per_tensor, _per_channel": {
        "float32 → int8, channels": 6_535,
        "float32 → int8, tensors": 6_535,
        "float32 → uint8, channels": 6_465,
        "float32 → uint8, tensors": 6_465,
    },
    "torch quantized_decomposed.quantize_per_token": {
        "float32 → int8, tokens": 5_106,
        "float32 → uint8, tokens": 3_376,
    },
    "torch quantize_per_tensor (FBGEMM)": {"float32 → int8": 9_139, "float32 → uint8": 5_436},
    "torch quantize_per_channel": {"float32 → int8": 5_106, "float32 → uint8": 3_376},
    "torchao int8, SYMMETRIC": {
        "float32, codes": 8_912,
        "bfloat16, scale": 254,
        "bfloat16, codes": 15,
        "float32, given scales": 6_535,
    },
    "torchao int4, SYMMETRIC, groups": {
        "float32, codes": 7_363,
        "bfloat16, scale": 1_914,
        "bfloat16, codes": 413,
    },
    "torchao uint8, ASYMMETRIC": {"float32, codes": 3, "bfloat16, codes": 1},
    "torchao uint4, ASYMMETRIC, groups": {"float32, codes": 6, "bfloat16, codes": 3},
    "torchao int8, SYMMETRIC_NO_CLIPPING_ERR": {"float32, scale": 90},
    "torchao float8": {
        "bfloat16 → float8_e4m3fn, 1 × 1024, scale": 222,
        "bfloat16 → float8_e5m2, 1 × 1024, scale": 222,
        "bfloat16 → float8_e4m3fn, 1 × 128, scale": 1_748,
        "bfloat16 → float8_e5m2, 1 × 128, scale": 1_748,
        "bfloat16 → float8_e4m3fn, 128 × 128, scale": 14,
        "bfloat16 → float8_e5m2, 128 × 128, scale": 14,
    },
}


# ---- comparison -------------------------------------------------------------------------------------


class Record(NamedTuple):
    peer: str
    row: str
    part: str
    elements: int
    differing: int


RECORDS: list[Record] = []
NOTES: list[str] = []  # lines under the table


def version(package: str) -> str:
    return importlib.metadata.version(package)


def needs(package: str, module: str | None = None):
    """The module, or a skip of the file where the package is missing."""
    return pytest.importorskip(
        module or package.replace("-", "_"),
        reason=f"{package}: make rivals-test",
        exc_type=ImportError,
    )


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """In how many elements bits differ. Any NaN equals any other, but among codes."""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    unequal = a.contiguous().view(kind) != b.contiguous().view(kind)
    if a.element_size() > 1 and a.is_floating_point():
        unequal &= ~(a.isnan() & b.isnan())
    return int(unequal.sum())


def same(peer: str, row: str, part: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Records how many elements differ: none, or as many as DIFFERING and the page's row say."""
    count = differing(theirs, ours)
    RECORDS.append(Record(peer, row, part, ours.numel(), count))
    expected = DIFFERING.get(row, {}).get(part, 0)
    assert count == expected, f"{row}, {part}: {count:,} of {ours.numel():,} differ"


def page_rows() -> dict[str, list[str]]:
    """The rows of the page's tables by their first cell."""
    cells = [
        row.split(" | ") for row in re.findall(r"^\| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    ]
    return {first: rest for first, *rest in cells}
