"""Exact sums of squares: integers in digits of 32 bits (limbs), rounded once (docs/numerics.md)."""

from __future__ import annotations

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
    """The same sums with each digit in 0…2^32 - 1."""
    rest, made = torch.zeros_like(digits[..., 0]), []
    for k in range(DIGITS):
        whole = digits[..., k] + rest
        made.append(whole & _MASK)
        rest = whole >> 32
    return torch.stack(made, -1)


def rounded(digits: _Tensor) -> _Tensor:
    """Carried digits as float64, rounded to nearest once."""
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
    power = (32 * top - shift - PLACES + 1023) << 52
    value = bits.to(torch.float64) * power.view(torch.float64)
    return torch.where(first == 0, 0.0, value).squeeze(-1)


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
        RuntimeError where tensors are on different devices. Digits are read on the CPU alone.
    """
    _checks.join_measures(limbs, max_error, counts, DIGITS)
    squares, errors = rounded(carried(limbs)).unbind(-1)
    return Measured(squares, errors, max_error, *counts.unbind(-1))
