"""Sizes, which a compiler's symbols may stand for: whether they fit, blocks of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .values import shown, shown_sizes, wrong


def _may_be_symbolic(value: object) -> bool:
    """Whether value is a compiler's symbol; dynamo shows a function those as plain numbers."""
    return isinstance(value, (torch.SymBool, torch.SymInt)) or torch.compiler.is_compiling()


def is_symbol(size: int) -> bool:
    """Whether a size is a compiler's symbol, which may have many values."""
    if not _may_be_symbolic(size):
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # heavy

    return not has_static_value(size)


def surely(condition: bool | torch.SymBool) -> bool:
    """A condition on sizes; False where a compiler cannot know it."""
    if not _may_be_symbolic(condition):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # heavy

    return guard_or_false(condition)


def known(condition: bool | torch.SymBool) -> bool:
    """A condition on sizes; False where only its values, and not its symbols, make it true."""
    if not _may_be_symbolic(condition):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # heavy

    return statically_known_true(condition)


def divides(p: int, n: int) -> bool:
    if surely(p == 1) or surely(p == n):
        return True
    return not (surely(n == 0) or surely(p == 0) or surely(n % p != 0))


def broadcast(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes broadcast with each other."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return not any(surely((m != n) & (m != 1) & (n != 1)) for m, n in pairs)


def fits(shape: Sequence[int], x_shape: Sequence[int]) -> bool:
    if len(shape) == len(x_shape):
        return all(map(divides, shape, x_shape))
    pairs = zip(reversed(shape), reversed(x_shape), strict=False)
    return len(shape) < len(x_shape) and not any(surely((p != 1) & (p != n)) for p, n in pairs)


def blocks_in(n: int, block: int) -> int:
    """How many blocks a dimension has; the last one may be short."""
    # Of a symbol that is x's own size there is one, which the sum does not say.
    return 1 if block == -1 or known(n == block) else (n + block - 1) // block


def has_short_block(shape: Sequence[int], block_size: Sequence[int]) -> bool:
    return any(b != -1 and surely(n % b != 0) for n, b in zip(shape, block_size, strict=True))


def blocks(
    block_size: Sequence[int], shape: Sequence[int], x_name: str = "x", short: bool = False,
    name: str = "block_size",
) -> None:  # fmt: skip
    if len(block_size) != len(shape):
        sizes = f"{len(shape)} sizes, one per dimension of {x_name} of shape {tuple(shape)}"
        raise wrong(ValueError, name, sizes, shown_sizes(block_size))
    for dim, (b, n) in enumerate(zip(block_size, shape, strict=True)):
        if surely(b == 0) or surely(b < -1) or (isinstance(b, int) and b >= 2**63):
            sizes = "sizes of at least 1, or -1 for a whole dimension"
            raise wrong(ValueError, name, sizes, shown_sizes(block_size))
        if not short and b != -1 and surely(n % b != 0):
            raise ValueError(
                f"block_size: {shown(b)} does not divide {n}, the size of dimension {dim} of {x_name}; "
                "a short last block needs compute_dtype=torch.float32"
            )
