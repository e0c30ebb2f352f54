"""Where the shard of a DTensor lies in the whole tensor, and what parameters belong to it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from . import _torch, philox, steps
from ._checks import blocks_in, has_short_block, wrong
from .formats import CODED_SCALES, scale_numbers

_Tensor = torch.Tensor
Span = tuple[int, int]  # a half-open range of indices

# ---- where shards lie -------------------------------------------------------------------------------


def span(n: int, sizes: Sequence[int], at: Sequence[int]) -> Span:
    """What is left of n elements, cut by torch.chunk once for each mesh dimension, at a coordinate."""
    start, stop = 0, n
    for ranks, i in zip(sizes, at, strict=True):
        step = -(-(stop - start) // ranks)
        start, stop = min(start + i * step, stop), min(start + (i + 1) * step, stop)
    return start, stop


@cache
def nest(n: int, block: int, sizes: tuple[int, ...]) -> bool:
    """Whether shards of n elements are whole blocks, and those of the blocks' indices the same ones."""
    blocks = -(-n // block)
    return all(
        span(n, sizes, at) == tuple(min(i * block, n) for i in span(blocks, sizes, at))
        for at in itertools.product(*map(range, sizes))
    )


class Shards:
    """Of a DTensor: its local shard, and the range of each dimension that it holds.

    unit: how many elements x has in one of its own along the last dimension: packed codes. All ranges
    count elements.
    """

    def __init__(self, x: DTensor, unit: int = 1):
        self.mesh, self.unit = x.device_mesh, unit
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:  # of observers
            raise RuntimeError("DTensor: this rank is not in its mesh")
        self.coordinate = coordinate
        if any(p.is_partial() for p in x.placements):  # the sum is x: no element is known before
            whole = [Replicate() if p.is_partial() else p for p in x.placements]
            x = x.redistribute(placements=whole)
        self.x, self.local, self.placements = x, x.to_local(), x.placements
        self.shape = tuple(int(n) for n in x.shape)
        self.cut_by = [self._mesh_dims(dim) for dim in range(x.dim())]
        self.sizes = [tuple(self.mesh.size(m) for m in dims) for dims in self.cut_by]
        at = [tuple(coordinate[m] for m in dims) for dims in self.cut_by]
        self.spans = list(map(span, self.shape, self.sizes, at))
        held = tuple(stop - start for start, stop in self.spans)
        if tuple(self.local.shape) != held:
            expected = f"a local shard of shape {held}, as torch.chunk cuts"
            raise wrong(RuntimeError, "DTensor", expected, tuple(self.local.shape))
        if unit > 1:
            self.shape = (*self.shape[:-1], self.shape[-1] * unit)
            start, stop = self.spans[-1]
            self.spans[-1] = unit * start, unit * stop
            self.whole_bytes(unit)

    def _mesh_dims(self, dim: int) -> list[int]:
        """The mesh dimensions that cut dim, in their order: a _StridedShard comes after split_factor."""
        order: list[int] = []
        for m in reversed(range(len(self.placements))):
            if getattr(self.placements[m], "dim", None) != dim:
                continue
            pieces, place = getattr(self.placements[m], "split_factor", 1), 0
            while pieces > 1 and place < len(order):
                pieces //= self.mesh.size(order[place])
                place += 1
            if pieces != 1:
                raise RuntimeError(f"DTensor: shards of {self.placements[m]} are not contiguous")
            order.insert(place, m)
        return order

    def whole_bytes(self, per_byte: int) -> None:
        if per_byte > 1 and not nest(self.shape[-1], per_byte, self.sizes[-1]):
            raise RuntimeError(
                f"DTensor: shards of {self.shape[-1]} elements over {math.prod(self.sizes[-1])} ranks "
                f"do not end with whole bytes of {per_byte} codes; shard another dimension"
            )

    def keeps(self, dim: int, block: int) -> bool:
        """Whether what has an element for each block stays sharded along dim, as x is."""
        return block < self.shape[dim] and nest(self.shape[dim], block, self.sizes[dim])

    def cut(self, blocks: Sequence[int]) -> list[int]:
        """The mesh dimensions whose borders cut blocks."""
        pairs = enumerate(zip(self.cut_by, blocks, strict=True))
        return sorted(m for dim, (dims, b) in pairs if not self.keeps(dim, b) for m in dims)

    def placed(self, blocks: Sequence[int]) -> list[Any]:
        """The placements of what has an element for each block."""
        cut = self.cut(blocks)
        return [Replicate() if m in cut else p for m, p in enumerate(self.placements)]

    def held(self, blocks: Sequence[int]) -> list[Span]:
        """The blocks of each dimension that this rank has in these placements."""
        made = []
        for dim, (b, (start, stop)) in enumerate(zip(blocks, self.spans, strict=True)):
            whole = self.cut_by[dim] and not self.keeps(dim, b)
            n = self.shape[dim]
            made.append((0, -(-n // b)) if whole else (-(-start // b), -(-stop // b)))
        return made

    def pieces(self, grid: Sequence[int | None]) -> Iterator[list[Span]]:
        """The ranges of the local shard between the borders of blocks: at most three a dimension."""
        ranges = []
        for dim, (b, (start, stop)) in enumerate(zip(grid, self.spans, strict=True)):
            borders = [start, stop]
            if b is not None and self.cut_by[dim]:
                borders[1:1] = min(-(-start // b) * b, stop), max(stop // b * b, start)
            borders = sorted(set(borders))
            ranges.append(list(itertools.pairwise(borders)))
        return map(list, itertools.product(*ranges))

    def part(self, t: _Tensor, piece: Sequence[Span], unit: int = 1) -> _Tensor:
        """A range of what lies as the local shard does."""
        for dim, ((low, high), (start, stop)) in enumerate(zip(piece, self.spans, strict=True)):
            if (low, high) != (start, stop):
                k = unit if dim == len(piece) - 1 else 1
                t = t.narrow(dim, (low - start) // k, (high - low) // k)
        return t

    def place(
        self, piece: Sequence[Span], blocks: Sequence[int], held: Sequence[Span]
    ) -> tuple[slice, ...]:
        """Where the blocks of a range are among those that this rank has."""
        dims = zip(piece, blocks, held, strict=True)
        return tuple(
            slice(low // b - first, -(-high // b) - first) for (low, high), b, (first, _) in dims
        )

    def merged(self, t: _Tensor, how: str, blocks: Sequence[int]) -> _Tensor:
        """t, which has integers for blocks, of all ranks that have a part of these blocks."""
        for m in (m for m in self.cut(blocks) if self.mesh.size(m) > 1):
            t = _torch.all_reduce(t, how, self.mesh, m)
        return t

    def numbers(self, chosen: _Tensor, shape: Sequence[int], blocks: Sequence[int]) -> _Tensor:
        """A global scale for the blocks that this rank has, of all in shape."""
        if chosen.dim() == 0:
            return local_part(chosen, [Replicate()] * self.mesh.ndim, self.mesh)
        held = self.held(blocks)
        sizes = [last - first for first, last in held]
        return _narrow(_expanded(chosen, shape, self.mesh), [low for low, _ in held], sizes)

    def distributed(
        self, local: _Tensor, placements: Sequence[Any], shape: Sequence[int],
        stride: Sequence[int] | None = None,
    ) -> DTensor:  # fmt: skip
        """A DTensor of a shape, contiguous if no strides are given; its shards lie as the whole does."""
        if stride is None:
            stride = torch.empty(tuple(shape), device="meta").stride()
        order = sorted(range(len(stride)), key=lambda dim: -stride[dim])
        back = sorted(order, key=order.__getitem__)
        local = local.permute(order).contiguous().permute(back)
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(shape),
            stride=tuple(stride),
        )  # fmt: skip

    def alike(self, local: _Tensor, unit: int = 1) -> DTensor:
        """What lies as x does, with unit elements of x in one of its own."""
        if unit == 1 and self.unit == 1:
            like = torch.empty_strided(self.shape, self.x.stride(), device="meta")
            stride = torch.empty_like(like).stride()
            return self.distributed(local, self.placements, self.shape, stride)
        shape = (*self.shape[:-1], self.shape[-1] // unit)
        return self.distributed(local, self.placements, shape)

    def of_blocks(self, local: _Tensor, blocks: Sequence[int], shape: Sequence[int]) -> DTensor:
        """The same of what has a number for each block, or a single one; further dimensions follow."""
        single = len(shape) < len(blocks) or 0 in self.shape
        placements = [Replicate()] * self.mesh.ndim if single else self.placed(blocks)
        return self.distributed(local, placements, shape)


def counted_once(x: Any, dim: int | None, block: int) -> tuple[_Tensor, int]:
    """The local shard of a DTensor, and its first index along dim.

    Of ranks that have the same shard the first one alone gets it. block: how many neighbours along dim
    share a number.
    """
    at = Shards(x)
    if dim is not None and not nest(at.shape[dim], block, at.sizes[dim]):
        raise ValueError(f"DTensor: borders of shards cut groups of {block}")
    places = zip(at.placements, at.coordinate, strict=True)
    if any(place.is_replicate() and i > 0 for place, i in places):
        return at.local.new_empty(0), 0
    return at.local, 0 if dim is None else at.spans[dim][0]


def whole_blocks(shape: Sequence[int], block_size: Sequence[int] | None) -> list[int]:
    """The block of each dimension, none of them -1."""
    given = [-1] * len(shape) if block_size is None else block_size
    return [max(n, 1) if b == -1 else int(b) for n, b in zip(shape, given, strict=True)]


# ---- parameters -------------------------------------------------------------------------------------


def local_part(p: _Tensor, placements: Sequence[Any], mesh: Any) -> _Tensor:
    """p's local part in these placements; of a plain tensor, which all ranks have, as well."""
    if not isinstance(p, DTensor):
        if all(place.is_replicate() for place in placements):
            return p.detach()
        p = DTensor.from_local(p.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    if p.device_mesh != mesh:
        names = "scale, zero_point, global_scale, seed"
        raise wrong(RuntimeError, names, f"DTensors of x's mesh, {mesh}", p.device_mesh)
    if tuple(p.placements) == tuple(placements):
        return p.to_local()
    if p.dtype in CODED_SCALES:  # gloo gathers neither float8 nor int16
        bits = DTensor.from_local(
            p.to_local().view(torch.uint8), mesh, p.placements, run_check=False,
            shape=p.shape, stride=p.stride(),
        )  # fmt: skip
        return bits.redistribute(placements=placements).to_local().view(p.dtype)
    wider: Any = p.to(torch.int32) if p.dtype in (torch.int16, torch.uint16) else p
    return wider.redistribute(placements=placements).to_local()


def _moved(place: Any, dim: int) -> Any:
    """A Shard or a _StridedShard of another dimension."""
    if place.dim == dim:
        return place
    more = {"split_factor": place.split_factor} if hasattr(place, "split_factor") else {}
    return type(place)(dim, **more)


class _Parameter:
    """A parameter beside x's shard, which has or gets what this shard needs.

    blocks: of each dimension of x: how many elements share a number; None where all do.
    """

    def __init__(self, p: _Tensor, at: Shards, block_size: Sequence[int] | None):
        lead, shape = len(at.shape) - p.dim(), [int(n) for n in p.shape]
        self.blocks: list[int | None] = []
        for dim, n in enumerate(at.shape):
            size = 1 if dim < lead else shape[dim - lead]
            given = None if block_size is None else block_size[dim]
            if size < 2:  # 0: there is nothing in x
                self.blocks.append(None)
            elif given not in (None, -1) and blocks_in(n, given) == size:
                self.blocks.append(given)
            else:
                self.blocks.append(n // size)
        kept = [b is not None and at.keeps(dim, b) for dim, b in enumerate(self.blocks)]
        placements: list[Any] = [Replicate()] * at.mesh.ndim
        for dim, dims in enumerate(at.cut_by):
            for m in dims if kept[dim] else ():
                placements[m] = _moved(at.placements[m], dim - lead)
        self.local, self.lead, self.at = local_part(p, placements, at.mesh), lead, at
        self.first = [
            start // b if k and b else 0
            for b, k, (start, _) in zip(self.blocks, kept, at.spans, strict=True)
        ]

    def spread(self, dim: int) -> None:
        """Repeat along a dimension, so that each element has a number of its own."""
        b = self.blocks[dim]
        assert b is not None
        self.local = self.local.repeat_interleave(b, dim - self.lead)
        self.first[dim], self.blocks[dim] = self.first[dim] * b, 1

    def part(self, piece: Sequence[Span]) -> _Tensor:
        """What belongs to a range of x's elements."""
        p = self.local
        for dim, ((low, high), b) in enumerate(zip(piece, self.blocks, strict=True)):
            if b is not None and self.at.cut_by[dim]:
                first, last = low // b, -(-high // b)
                p = p.narrow(dim - self.lead, first - self.first[dim], last - first)
        return p


class Beside:
    """Parameters beside x's shard, in pieces that an operator takes."""

    def __init__(self, at: Shards, given: dict[str, Any], unit: int, over: Any = None):
        scale, whole = given["scale"], given.get("global_scale")
        blocks = given.get("block_size")
        self.at, self.short = at, blocks is not None and has_short_block(at.shape, blocks)
        self.whole = None
        self.parts = {
            name: _Parameter(given[name], at, blocks)
            for name in ("scale", "zero_point")
            if given.get(name) is not None
        }
        if whole is not None and whole.dim() == 0:
            self.whole = local_part(whole, [Replicate()] * at.mesh.ndim, at.mesh)
        elif whole is not None:  # steps multiply by it once, in float32: so here
            p = self.parts["scale"]
            numbers = _expanded(whole, tuple(scale.shape), at.mesh)
            numbers = _narrow(numbers, p.first, p.local.shape)
            p.local = scale_numbers(p.local) * numbers
        self.over = over
        self.grid = [self._borders(dim, unit) for dim in range(len(at.shape))]

    def _borders(self, dim: int, unit: int) -> int | None:
        """Of a dimension that is cut: the block at whose borders x is taken apart."""
        if not self.at.cut_by[dim]:
            return None
        found = {p.blocks[dim] for p in self.parts.values()} - {None, 1}
        grid = self.over[dim] if self.over else 1
        if grid == 1 or grid >= self.at.shape[dim]:
            grid = found.pop() if len(found) == 1 else None
            last = dim == len(self.at.shape) - 1
            if grid is not None and last and grid % unit != 0:
                grid = None
        for p in self.parts.values():
            if p.blocks[dim] not in (None, 1, grid):
                p.spread(dim)
        return grid

    def pieces(self) -> Iterator[tuple[list[Span], dict[str, Any]]]:
        """The ranges, and the arguments of each."""
        for piece in self.at.pieces(self.grid):
            made: dict[str, Any] = {name: p.part(piece) for name, p in self.parts.items()}
            if self.short:
                made["block_size"] = [-1 if b is None else b for b in self.parts["scale"].blocks]
            if self.whole is not None:
                made["global_scale"] = self.whole
            yield piece, made


def _expanded(whole: _Tensor, shape: Sequence[int], mesh: Any) -> _Tensor:
    """A global scale with dimensions as float32 in scale's shape."""
    p = local_part(whole, [Replicate()] * mesh.ndim, mesh).to(torch.float32)
    return steps.expand(p, shape).expand(tuple(shape))


def _narrow(t: _Tensor, first: Sequence[int], sizes: Sequence[int]) -> _Tensor:
    for dim, (low, size) in enumerate(zip(first, sizes, strict=True)):
        t = t.narrow(dim, low, size)
    return t


def index_of(at: Shards, index: Sequence[int] | None, piece: Sequence[Span]) -> list[int]:
    """Where the random numbers of a piece begin, and how far they are apart."""
    offset, *strides = index or philox.shard_index(at.shape, [0] * len(at.shape))
    return [offset + sum(low * s for (low, _), s in zip(piece, strides, strict=True)), *strides]
