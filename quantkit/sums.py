"""Exact sums, rounded once: integers in digits of 32 bits, also called limbs (docs/numerics.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from . import _checks, _torch
from .params import same

_Tensor = torch.Tensor

DIGITS = 19
PLACES = 298  # 2^298 times a sum of squares of float32 numbers is an integer
_MASK = 0xFFFFFFFF


def of_squares(x: _Tensor, block: _Tensor, blocks: int) -> _Tensor:
    """The sum of x² over each block in digits, of finite float32 x: int64, (blocks, DIGITS).

    block: which block each element belongs to, int64 of x's shape; both have one dimension.
    """
    bits = x.view(torch.int32).to(torch.int64) & 0x7FFFFFFF
    field, fraction = bits >> 23, bits & 0x7FFFFF
    significand = torch.where(field > 0, fraction | 0x800000, fraction)
    square, position = significand * significand, 2 * (field - 1).clamp(min=0)
    digits = x.new_zeros(blocks * DIGITS, dtype=torch.int64)
    for half in (0, 24):  # of a square's 48 bits, so that none is lost by moving them
        moved = ((square >> half) & 0xFFFFFF) << ((position + half) & 31)
        first = block * DIGITS + ((position + half) >> 5)
        digits.index_add_(0, first, moved & _MASK)
        digits.index_add_(0, first + 1, moved >> 32)
    return carried(digits.view(blocks, DIGITS))


def carried(digits: _Tensor) -> _Tensor:
    """The same sums, from 0 on, with each digit in 0…2^32 - 1."""
    return _carried(digits)[0]


def _carried(digits: _Tensor) -> tuple[_Tensor, _Tensor]:
    """With what is left above the last digit: below 0 for sums that are."""
    rest, made = torch.zeros_like(digits[..., 0]), []
    for k in range(DIGITS):
        whole = digits[..., k] + rest
        made.append(whole & _MASK)
        rest = whole >> 32
    return torch.stack(made, -1), rest


# Bits of a significand, and the exponent of the last one of subnormal numbers.
_PRECISION = {
    torch.float64: (53, -1074), torch.float32: (24, -149), torch.bfloat16: (8, -133),
    torch.float16: (11, -24),
}  # fmt: skip


def rounded(digits: _Tensor, dtype: torch.dtype = torch.float64) -> _Tensor:
    """Carried digits in dtype, rounded to nearest, ties to even, once."""
    places = torch.arange(DIGITS, device=digits.device)
    top = torch.where(digits != 0, places, 0).amax(-1, keepdim=True)

    def digit(below: int) -> _Tensor:
        place = top - below
        return torch.where(place < 0, 0, digits.gather(-1, place.clamp(min=0)))

    first, second, third = digit(0), digit(1), digit(2)
    # From the exponent field of a double: what inductor makes of frexp does not compile.
    length = ((first.to(torch.float64).view(torch.int64) >> 52) - 1022).clamp(min=0)
    # 55 bits from the first that is 1; the last also stands for all below it.
    shift = 55 - length
    wide, rest = shift >= 32, torch.where(places < top - 2, digits, 0).amax(-1, keepdim=True)
    up, down = (shift - 32).clamp(min=0), (32 - shift).clamp(min=0)
    left = (64 - shift).clamp(max=32)
    bits = first << shift | torch.where(wide, second << up | third >> left, second >> down)
    lost = torch.where(wide, third & ((1 << left) - 1), second & ((1 << down) - 1) | third)
    bits = bits | ((lost | rest) != 0)
    # Down to the last bit that dtype has there.
    exponent, (precision, least) = 32 * top - shift - PLACES, _PRECISION[dtype]
    drop = (least - exponent).clamp(min=55 - precision, max=60)
    kept, below = bits >> drop, bits & ((1 << drop) - 1)
    half = 1 << (drop - 1)
    kept = kept + ((below > half) | ((below == half) & (kept & 1 == 1)))
    power = (exponent + drop + 1023) << 52
    value = kept.to(torch.float64) * power.view(torch.float64)
    value = torch.where(first == 0, 0.0, value).squeeze(-1)
    return value if dtype == torch.float64 else value.to(torch.float32).to(dtype)


def of_terms(
    terms: _Tensor, shape: Sequence[int],
    over: Callable[[Callable[..., _Tensor], _Tensor], _Tensor], dtype: torch.dtype,
) -> _Tensor:  # fmt: skip
    """The sum of float64 terms, which it overwrites, over each block, rounded once to dtype.

    Each term is a product of two float32 numbers, or not finite: then the sum is what IEEE's addition
    gives in any order. A sum of 0 is +0.0. over(torch.sum, t), of this shape, is the sum over each block.

    Terms are cut at a multiple of 2^place that makes float64's own sum of their upper parts exact
    (Rump, Ogita and Oishi, "Accurate floating-point summation", 2008), then again what is left.
    """
    special = None
    if not math.isfinite(_largest(terms)):
        finite = torch.isfinite(terms)
        special = over(torch.sum, torch.where(finite, 0.0, terms))
        terms = terms.masked_fill_(~finite, 0.0)
    upper = torch.empty_like(terms)
    digits = terms.new_zeros((*shape, DIGITS), dtype=torch.int64)
    length = max(2, math.ceil(math.log2(terms.numel() / math.prod(shape))))
    while largest := _largest(terms):
        place = max(math.frexp(largest)[1] + length - 53, -PLACES)
        cut = 1.5 * 2.0 ** (place + 52)
        terms -= torch.add(terms, cut, out=upper).sub_(cut)
        whole = (over(torch.sum, upper) * 2.0**-place).to(torch.int64)
        first, shift = divmod(place + PLACES, 32)
        low = (whole & _MASK) << shift
        digits[..., first] += low & _MASK
        digits[..., first + 1] += (low >> 32) + ((whole >> 32) << shift)
    negative = (_carried(digits)[1] < 0).unsqueeze(-1)
    value = rounded(carried(torch.where(negative, -digits, digits)), dtype)
    value = torch.where(negative.squeeze(-1), -value, value)
    return value if special is None else torch.where(special == 0, value, special.to(dtype))


def _largest(x: _Tensor) -> float:
    """The greatest abs(x), NaN where one is: in one pass without a temporary."""
    low, high = torch.aminmax(x)
    return max(-float(low), float(high))


class Measured(NamedTuple):
    """How far a quantized tensor is from x, over each block that was measured.

    Two of them are equal where all attributes have the same bits.

    Attributes:
        squares: the sum of x², float64.
        squared_errors: the sum of (x_hat - x)², float64. Both sums are exact and rounded once.
        max_error: the greatest abs(x_hat - x), float32.
        saturated: how many elements lie outside the limits, int64; NaN does not count.
        left_out: how many have an error that is not finite, int64; the other attributes but
            ``saturated`` are without them.
    """

    squares: _Tensor
    squared_errors: _Tensor
    max_error: _Tensor
    saturated: _Tensor
    left_out: _Tensor

    @property
    def sqnr_db(self) -> _Tensor:
        """The signal-to-quantization-noise ratio in dB: ``10 log10(squares / squared_errors)``."""
        return 10 * torch.log10(self.squares / self.squared_errors)

    def __eq__(self, other: object) -> bool:
        """By contents: tensors by dtype, shape, device and bits, without any (meta, fake) by identity."""
        return type(other) is type(self) and all(map(same, self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(tuple(self.squares.shape))


_torch.register_namedtuple(Measured, "quantkit.Measured")


def join_measures(limbs: _Tensor, max_error: _Tensor, counts: _Tensor) -> Measured:
    """Round sums that were measured apart, such as on several devices or over several batches.

    Args:
        limbs: int64 of shape (..., 2, 19): the sum of up to 2^31 results of :func:`measure_limbs`.
        max_error: float32, the greatest of theirs.
        counts: int64 of shape (..., 2), the sum of theirs.

    Returns:
        What :func:`measure` would return of all elements at once, bit for bit.

    Raises:
        TypeError or ValueError that names the argument, its value and what was expected.
        RuntimeError where tensors are on different devices, or are DTensors. Digits are read on the CPU
        alone.
    """
    _torch.no_dtensors("join_measures", limbs, max_error, counts)
    _checks.join_measures(limbs, max_error, counts, DIGITS)
    squares, errors = rounded(carried(limbs)).unbind(-1)
    return Measured(squares, errors, max_error, *counts.unbind(-1))
