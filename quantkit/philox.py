"""Random numbers that depend on a seed and an element's index alone: Philox4x32-10 (docs/numerics.md).

The generator is that of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), with the
index as its counter. It is no cryptographic generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import _checks

_Tensor = torch.Tensor

ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_STEPS = 0x9E3779B9, 0xBB67AE85  # of the key, from round to round
_MASK = 0xFFFFFFFF


def _product(a: _Tensor, b: int) -> tuple[_Tensor, _Tensor]:
    """The upper and the lower 32 bits of a product of two numbers of 32 bits, in int64."""
    upper = (a >> 16) * b + ((a & 0xFFFF) * b >> 16)
    return upper >> 16, a * b & _MASK


def words(counter: Sequence[_Tensor], key: Sequence[_Tensor]) -> list[_Tensor]:
    """Four words of 32 bits for counters of four, and keys of two, all in int64."""
    a, b, c, d = counter
    first, second = key
    for _ in range(ROUNDS):
        upper_a, lower_a = _product(a, _MULTIPLIERS[0])
        upper_c, lower_c = _product(c, _MULTIPLIERS[1])
        a, b, c, d = upper_c ^ b ^ first, lower_c, upper_a ^ d ^ second, lower_a
        first, second = (first + _STEPS[0]) & _MASK, (second + _STEPS[1]) & _MASK
    return [a, b, c, d]


def draws(seed: _Tensor, index: _Tensor) -> _Tensor:
    """16 bits for each index, int64: half of a word; eight neighbours share a counter.

    seed: int64 (seed, stream). index: int64, from 0 on.
    """
    counter, (key, stream) = index >> 3, seed.unbind()
    halves = [t & _MASK for t in (counter, counter >> 32)]
    halves += [(t & _MASK).expand_as(index) for t in (stream, stream >> 32)]
    made = torch.stack(words(halves, (key & _MASK, key >> 32 & _MASK)))
    word = made.gather(0, (index >> 1 & 3).unsqueeze(0)).squeeze(0)
    return word >> 16 * (index & 1) & 0xFFFF


def places(shape: Sequence[int], index: Sequence[int] | None, device: torch.device) -> _Tensor:
    """The index of each element of a tensor: offset + Σ index of dimension d · stride d.

    index: (offset, stride of each dimension); None is that of a contiguous tensor.
    """
    offset, *strides = shard_index(shape, [0] * len(shape)) if index is None else index
    place = torch.full((), offset, dtype=torch.int64, device=device)
    for size, stride in zip(shape, strides, strict=True):
        place = place.unsqueeze(-1) + torch.arange(size, device=device) * stride
    return place


def uniform(seed: _Tensor, shape: Sequence[int], index: Sequence[int] | None) -> _Tensor:
    """(2 draw + 1) 2^-17 for each element of a tensor: float32."""
    draw = draws(seed, places(shape, index, seed.device))
    return (2 * draw + 1).to(torch.float32) * 2.0**-17


def shard_index(global_shape: Sequence[int], start: Sequence[int]) -> tuple[int, ...]:
    """The ``index`` of a part of a tensor, so that random rounding gives it the bits of the whole.

    The random numbers come from Philox, which is no cryptographic generator.

    Args:
        global_shape: the shape of the whole tensor.
        start: where the part begins in it, one int for each dimension.

    Returns:
        1 + rank ints: the place of the part's first element in the whole, then the strides of a
        contiguous tensor of global_shape.

    Raises:
        TypeError where one is no list of ints. ValueError where they differ in length, a size is
        negative or start lies beyond the end.
    """
    global_shape, start = _checks.shard(global_shape, start)
    strides, stride = [], 1
    for size in reversed(global_shape):
        strides.append(stride)
        stride *= size
    strides.reverse()
    return sum(a * b for a, b in zip(start, strides, strict=True)), *strides
