"""The operators over DTensors: the bits of the whole tensor, whatever the mesh and the placements.

Loaded when a DTensor comes. Every operator gets a rule for DTensors, so the public functions need none.
A rule works on the local shard. x is never gathered: where the border of a shard cuts blocks, ranks
exchange the extremes of these blocks, or their sums. docs/distributed.md says what that costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch.distributed.tensor import DTensor, Replicate

from . import philox, reference, sums
from ._checks import blocks_in, has_short_block, wrong
from .formats import OF_NAME, scale_numbers
from .operators import GRADIENTS, OPERATORS, functional

_Tensor = torch.Tensor
_Span = tuple[int, int]  # a half-open range of indices

# ---- where shards lie -------------------------------------------------------------------------------


def _span(n: int, sizes: Sequence[int], at: Sequence[int]) -> _Span:
    """What is left of n elements, cut by torch.chunk once for each mesh dimension, at a coordinate."""
    start, stop = 0, n
    for ranks, i in zip(sizes, at, strict=True):
        step = -(-(stop - start) // ranks)
        start, stop = min(start + i * step, stop), min(start + (i + 1) * step, stop)
    return start, stop


@cache
def _nest(n: int, block: int, sizes: tuple[int, ...]) -> bool:
    """Whether shards of n elements are whole blocks, and those of the blocks' indices the same ones."""
    blocks = -(-n // block)
    return all(
        _span(n, sizes, at) == tuple(min(i * block, n) for i in _span(blocks, sizes, at))
        for at in itertools.product(*map(range, sizes))
    )


class _Shards:
    """Of a DTensor: its local shard, and the range of each dimension that it holds.

    unit: how many elements x has in one of its own along the last dimension: packed codes. All ranges
    count elements.
    """

    def __init__(self, x: DTensor, unit: int = 1):
        self.unit = unit
        self.mesh = x.device_mesh
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:
            raise RuntimeError("x: this rank is not in its mesh")
        if any(p.is_partial() for p in x.placements):  # the sum is x: no element is known before
            whole = [Replicate() if p.is_partial() else p for p in x.placements]
            x = x.redistribute(placements=whole)
        self.x, self.local, self.placements = x, x.to_local(), x.placements
        self.shape = tuple(int(n) for n in x.shape)
        self.cut_by = [self._mesh_dims(dim) for dim in range(x.dim())]
        self.sizes = [tuple(self.mesh.size(m) for m in dims) for dims in self.cut_by]
        at = [tuple(coordinate[m] for m in dims) for dims in self.cut_by]
        self.spans = list(map(_span, self.shape, self.sizes, at))
        held = tuple(stop - start for start, stop in self.spans)
        if tuple(self.local.shape) != held:
            raise wrong(RuntimeError, "x", f"a local shard of shape {held}, as torch.chunk cuts",
                        tuple(self.local.shape))  # fmt: skip
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
                raise RuntimeError(f"x: {self.placements[m]} leaves shards that are not contiguous")
            order.insert(place, m)
        return order

    def whole_bytes(self, per_byte: int) -> None:
        if per_byte > 1 and not _nest(self.shape[-1], per_byte, self.sizes[-1]):
            raise RuntimeError(
                f"x: shards of {self.shape[-1]} elements over {math.prod(self.sizes[-1])} ranks "
                f"do not end with whole bytes of {per_byte} codes; shard another dimension"
            )

    def keeps(self, dim: int, block: int) -> bool:
        """Whether what has an element for each block stays sharded along dim, as x is."""
        return block < self.shape[dim] and _nest(self.shape[dim], block, self.sizes[dim])

    def cut(self, blocks: Sequence[int]) -> list[int]:
        """The mesh dimensions whose borders cut blocks."""
        pairs = enumerate(zip(self.cut_by, blocks, strict=True))
        return sorted(m for dim, (dims, b) in pairs if not self.keeps(dim, b) for m in dims)

    def placed(self, blocks: Sequence[int]) -> list[Any]:
        """The placements of what has an element for each block."""
        cut = self.cut(blocks)
        return [Replicate() if m in cut else p for m, p in enumerate(self.placements)]

    def held(self, blocks: Sequence[int]) -> list[_Span]:
        """The blocks of each dimension that this rank has in these placements."""
        made = []
        for dim, (b, (start, stop)) in enumerate(zip(blocks, self.spans, strict=True)):
            whole = self.cut_by[dim] and not self.keeps(dim, b)
            n = self.shape[dim]
            made.append((0, -(-n // b)) if whole else (-(-start // b), -(-stop // b)))
        return made

    def pieces(self, grid: Sequence[int | None]) -> Iterator[list[_Span]]:
        """The ranges of the local shard between the borders of blocks: at most three a dimension."""
        ranges = []
        for dim, (b, (start, stop)) in enumerate(zip(grid, self.spans, strict=True)):
            borders = [start, stop]
            if b is not None and self.cut_by[dim]:
                borders[1:1] = min(-(-start // b) * b, stop), max(stop // b * b, start)
            borders = sorted(set(borders))
            ranges.append(list(itertools.pairwise(borders)))
        return map(list, itertools.product(*ranges))

    def part(self, t: _Tensor, piece: Sequence[_Span], unit: int = 1) -> _Tensor:
        """A range of what lies as the local shard does."""
        for dim, ((low, high), (start, stop)) in enumerate(zip(piece, self.spans, strict=True)):
            if (low, high) != (start, stop):
                k = unit if dim == len(piece) - 1 else 1
                t = t.narrow(dim, (low - start) // k, (high - low) // k)
        return t

    def place(
        self, piece: Sequence[_Span], blocks: Sequence[int], held: Sequence[_Span]
    ) -> tuple[slice, ...]:
        """Where the blocks of a range are among those that this rank has."""
        dims = zip(piece, blocks, held, strict=True)
        return tuple(
            slice(low // b - first, -(-high // b) - first) for (low, high), b, (first, _) in dims
        )

    def merged(self, t: _Tensor, how: str, blocks: Sequence[int]) -> _Tensor:
        """t, which has integers for blocks, of all ranks that have a part of these blocks."""
        for m in (m for m in self.cut(blocks) if self.mesh.size(m) > 1):
            t = funcol.wait_tensor(funcol.all_reduce(t, how, (self.mesh, m)))
        return t

    def numbers(self, chosen: _Tensor, shape: Sequence[int], blocks: Sequence[int]) -> _Tensor:
        """A global scale for the blocks that this rank has, of all in shape."""
        if chosen.dim() == 0:
            return _local(chosen, [Replicate()] * self.mesh.ndim, self.mesh)
        held = self.held(blocks)
        sizes = [last - first for first, last in held]
        return _narrow(_expanded(chosen, shape, self.mesh), [low for low, _ in held], sizes)

    def distributed(
        self, local: _Tensor, placements: Sequence[Any], shape: Sequence[int],
        stride: Sequence[int] | None = None,
    ) -> DTensor:  # fmt: skip
        """A DTensor of a shape, contiguous if no strides are given."""
        if stride is None:
            stride = torch.empty(tuple(shape), device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(shape),
            stride=tuple(stride),
        )  # fmt: skip

    def alike(self, local: _Tensor, unit: int = 1) -> DTensor:
        """What lies as x does, with unit elements of x in one of its own."""
        if unit == 1 and self.unit == 1:
            return self.distributed(local, self.placements, self.shape, self.x.stride())
        shape = (*self.shape[:-1], self.shape[-1] // unit)
        return self.distributed(local, self.placements, shape)

    def of_blocks(self, local: _Tensor, blocks: Sequence[int], shape: Sequence[int]) -> DTensor:
        """The same of what has a number for each block, or a single one; further dimensions follow."""
        single = len(shape) < len(blocks) or 0 in self.shape
        placements = [Replicate()] * self.mesh.ndim if single else self.placed(blocks)
        return self.distributed(local, placements, shape)


def _blocks(shape: Sequence[int], block_size: Sequence[int] | None) -> list[int]:
    """The block of each dimension, none of them -1."""
    given = [-1] * len(shape) if block_size is None else block_size
    return [max(n, 1) if b == -1 else int(b) for n, b in zip(shape, given, strict=True)]


# ---- parameters -------------------------------------------------------------------------------------


def _local(p: _Tensor, placements: Sequence[Any], mesh: Any) -> _Tensor:
    """p's local part in these placements; of a plain tensor, which all ranks have, as well."""
    if not isinstance(p, DTensor):
        if all(place.is_replicate() for place in placements):
            return p.detach()
        p = DTensor.from_local(p.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    if p.device_mesh != mesh:
        raise RuntimeError("scale, zero_point, global_scale: expected DTensors of x's mesh")
    if tuple(p.placements) == tuple(placements):
        return p.to_local()
    # gloo gathers neither float8 nor int16.
    dtype, size = p.dtype, p.element_size()
    carried = size <= 2 and dtype not in (torch.uint8, torch.int8)
    if carried and not any(place.is_partial() for place in p.placements):
        bits = p.to_local().view(torch.uint8 if size == 1 else torch.int16).to(torch.int32)
        p = DTensor.from_local(
            bits, mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
        bits = p.redistribute(placements=placements).to_local()
        return bits.to(torch.uint8 if size == 1 else torch.int16).view(dtype)
    return p.redistribute(placements=placements).to_local()


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

    def __init__(self, p: _Tensor, at: _Shards, block_size: Sequence[int] | None):
        lead, shape = len(at.shape) - p.dim(), [int(n) for n in p.shape]
        self.blocks: list[int | None] = []
        for dim, n in enumerate(at.shape):
            size = 1 if dim < lead else shape[dim - lead]
            given = None if block_size is None else block_size[dim]
            if size == 1:
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
        self.local, self.lead, self.at = _local(p, placements, at.mesh), lead, at
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

    def part(self, piece: Sequence[_Span]) -> _Tensor:
        """What belongs to a range of x's elements."""
        p = self.local
        for dim, ((low, high), b) in enumerate(zip(piece, self.blocks, strict=True)):
            if b is not None and self.at.cut_by[dim]:
                first, last = low // b, -(-high // b)
                p = p.narrow(dim - self.lead, first - self.first[dim], last - first)
        return p


class _Beside:
    """Parameters beside x's shard, in pieces that an operator takes."""

    def __init__(self, at: _Shards, given: dict[str, Any], unit: int, over: Any = None):
        scale, whole = given["scale"], given.get("global_scale")
        if any(getattr(given[n], "requires_grad", False) for n in ("scale", "zero_point")):
            raise RuntimeError(
                "scale, zero_point: those beside a DTensor get no gradient; pass detached ones"
            )
        blocks = given.get("block_size")
        self.at, self.short = at, blocks is not None and has_short_block(at.shape, blocks)
        self.whole = None
        self.parts = {
            name: _Parameter(given[name], at, blocks)
            for name in ("scale", "zero_point")
            if given.get(name) is not None
        }
        if whole is not None and whole.dim() == 0:
            self.whole = _local(whole, [Replicate()] * at.mesh.ndim, at.mesh)
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

    def pieces(self) -> Iterator[tuple[list[_Span], dict[str, Any]]]:
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
    p = _local(whole, [Replicate()] * mesh.ndim, mesh).to(torch.float32)
    return reference.expand(p, shape).expand(tuple(shape))


def _narrow(t: _Tensor, first: Sequence[int], sizes: Sequence[int]) -> _Tensor:
    for dim, (low, size) in enumerate(zip(first, sizes, strict=True)):
        t = t.narrow(dim, low, size)
    return t


def _index(at: _Shards, index: Sequence[int] | None, piece: Sequence[_Span]) -> list[int]:
    """Where the random numbers of a piece begin, and how far they are apart."""
    offset, *strides = index or philox.shard_index(at.shape, [0] * len(at.shape))
    return [offset + sum(low * s for (low, _), s in zip(piece, strides, strict=True)), *strides]


# ---- rules ------------------------------------------------------------------------------------------

_Arguments = dict[str, Any]


def _names(name: str) -> list[str]:
    return [a.name for a in functional(name)._schema.arguments]


def _call(name: str, values: _Arguments) -> Any:
    """The rule of an operator, with those of the values that it takes."""
    return _RULES[name.partition(".")[0]](name, {k: values[k] for k in _names(name) if k in values})


def _shaped(name: str, given: _Arguments, x: _Tensor) -> tuple[_Tensor, ...]:
    """An operator's results without values, for another x."""
    values = {**given, next(iter(given)): x}
    by_name = [a.name for a in functional(name)._schema.arguments if a.kwarg_only]
    placed = [v for k, v in values.items() if k not in by_name]
    made = OPERATORS[name].shaped(*placed, **{k: values[k] for k in by_name if k in values})
    return made if isinstance(made, tuple) else (made,)


def _codes_of_a_byte(given: _Arguments) -> int:
    return OF_NAME[given["format"]].per_byte if "format" in given else 1


def _with_parameters(name: str, given: _Arguments) -> Any:
    """Operators of x, or q, beside parameters: each result lies as x does."""
    operator, x_name, base = functional(name), next(iter(given)), name.partition(".")[0]
    per_byte = _codes_of_a_byte(given)
    at = _Shards(given[x_name], per_byte if base == "dequantize" else 1)
    unit = per_byte if base == "quantize" else 1  # of the result
    at.whole_bytes(unit)
    beside = _Beside(at, given, per_byte)
    without = (x_name, "scale", "block_size", "global_scale")
    rest = {k: v for k, v in given.items() if k not in without}
    results: tuple[_Tensor, ...] | None = None
    for piece, parameters in beside.pieces():
        if given.get("seed") is not None:
            rest["index"] = _index(at, given.get("index"), piece)
        made = _tuple(operator(at.part(at.local, piece, at.unit), **{**rest, **parameters}))
        if piece == at.spans:
            results = made
            break
        results = results or _shaped(name, given, at.local)
        for whole, part in zip(results, made, strict=True):
            at.part(whole, piece, unit).copy_(part)
    made = tuple(at.alike(t, unit) for t in results or _shaped(name, given, at.local))
    return made if len(made) > 1 else made[0]


def _tuple(results: Any) -> tuple[_Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _keys(t: _Tensor) -> _Tensor:
    """Integers in the order of t, NaN above all: a maximum that no backend can spoil."""
    if not t.is_floating_point():
        return t.to(torch.int64) ^ (_LOWEST if t.dtype == torch.uint64 else 0)
    t = torch.where(t.isnan(), torch.nan, t)  # one NaN, positive
    t = t.view(torch.int64) if t.dtype == torch.float64 else t.to(torch.float32).view(torch.int32)
    return torch.where(t < 0, t ^ torch.iinfo(t.dtype).max, t)


def _values(keys: _Tensor, dtype: torch.dtype) -> _Tensor:
    """What has these keys."""
    if not dtype.is_floating_point:
        return (keys ^ (_LOWEST if dtype == torch.uint64 else 0)).to(dtype)
    bits = torch.where(keys < 0, keys ^ torch.iinfo(keys.dtype).max, keys)
    return bits.view(torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)


_LOWEST = -(2**63)


def _extremes(at: _Shards, blocks: list[int], magnitude: bool) -> list[_Tensor]:
    """[minima, maxima] of the blocks whose parameters this rank gets; with magnitude [max |x|]."""
    held, dtype = at.held(blocks), at.local.dtype
    wide = dtype == torch.float64 or not dtype.is_floating_point
    lowest = torch.iinfo(torch.int64 if wide else torch.int32)
    sizes = [1 if magnitude else 2, *(last - first for first, last in held)]
    keys = at.local.new_full(sizes, lowest.min, dtype=torch.int64 if wide else torch.int32)
    for piece in at.pieces(blocks):
        low, high = functional("aminmax")(at.part(at.local, piece), blocks)
        here = (slice(None), *at.place(piece, blocks, held))
        if magnitude:
            keys[here] = _keys(torch.maximum(low.abs(), high.abs())).unsqueeze(0)
        else:
            keys[here] = torch.stack([~_keys(low), _keys(high)])
    keys = at.merged(keys, "max", blocks)
    high = _values(keys[-1], dtype)
    if magnitude:
        return [high]
    low = _values(~keys[0], dtype)
    return [torch.where(high.isnan(), high, low) if dtype.is_floating_point else low, high]


def _of_whole_blocks(
    name: str, given: _Arguments, at: _Shards, blocks: list[int], **local: Any
) -> tuple[_Tensor, ...]:
    """An operator that chooses, of the local shard, whose borders cut no block."""
    sizes = None if given["block_size"] is None else blocks
    return _tuple(functional(name)(**{**given, "x": at.local, "block_size": sizes, **local}))


def _choosing(name: str, given: _Arguments) -> tuple[DTensor, ...]:
    """Operators that choose parameters of x: of the extremes of whole blocks."""
    at, chosen = _Shards(given["x"]), given.get("global_scale")
    blocks = _blocks(at.shape, given["block_size"])
    shape = reference.parameter_shape(at.shape, given["block_size"])
    local = {} if chosen is None else {"global_scale": at.numbers(chosen, shape, blocks)}
    if 0 in at.shape:
        made = [t.zero_() for t in _shaped(name, given, at.local.new_empty(at.shape))]
    elif not at.cut(blocks):
        made = _of_whole_blocks(name, given, at, blocks, **local)
    else:
        magnitude = at.local.is_floating_point() and given.get("symmetric", False)
        made = _extremes(at, blocks, magnitude)
        if name != "aminmax":
            if chosen is not None and chosen.dim() > 0:
                local["global_scale"] = local["global_scale"].unsqueeze(-1)
            local["x"] = torch.stack(made, -1)
            local["block_size"] = [*[1] * len(at.shape), len(made)]
            made = [t.squeeze(-1) if t.dim() else t for t in functional(name)(**{**given, **local})]
        if not shape:
            made = [t.reshape(()) for t in made]
    return tuple(at.of_blocks(t, blocks, shape if t.dim() else ()) for t in made)


def _dynamic(name: str, given: _Arguments) -> tuple[DTensor, ...]:
    """Operators that choose and quantize: in one call where no border cuts blocks."""
    at, chosen, per_byte = _Shards(given["x"]), given.get("global_scale"), _codes_of_a_byte(given)
    at.whole_bytes(per_byte)
    base, dot, overload = name.partition(".")
    blocks = _blocks(at.shape, given["block_size"])
    if 0 in at.shape or at.cut(blocks):
        values = {**given, "x": at.x}
        scale, zero_point = _call(f"choose_qparams{dot}{overload}", values)
        has_zero_point = "format" not in given or OF_NAME[given["format"]].has_zero_point
        values.update(scale=scale, zero_point=zero_point if has_zero_point else None)
        values["q"] = _call(f"quantize{dot}{overload}", values)
        if base == "dynamic_quantize":
            return values["q"], scale, zero_point
        return values["q"], _call(f"dequantize{dot}{overload}", values), scale, zero_point
    shape = reference.parameter_shape(at.shape, given["block_size"])
    local = {} if chosen is None else {"global_scale": at.numbers(chosen, shape, blocks)}
    if given.get("seed") is not None:
        local["index"] = _index(at, given.get("index"), at.spans)
    q, *x_hat, scale, zero_point = _of_whole_blocks(name, given, at, blocks, **local)
    parameters = (at.of_blocks(t, blocks, shape if t.dim() else ()) for t in (scale, zero_point))
    return at.alike(q, per_byte), *map(at.alike, x_hat), *parameters


def _measuring(name: str, given: _Arguments) -> tuple[DTensor, ...]:
    """measure and measure_limbs: digits of parts are added, and carried once."""
    at, over = _Shards(given["x"]), given.get("over")
    blocks, shape = _blocks(at.shape, over), reference.parameter_shape(at.shape, over)
    if 0 in at.shape:
        made = [t.zero_() for t in _shaped(name, given, at.local.new_empty(at.shape))]
        return tuple(at.of_blocks(t, blocks, t.shape) for t in made)
    held = at.held(blocks)
    sizes = [last - first for first, last in held]
    both = at.local.new_zeros((*sizes, 2 * sums.DIGITS + 2), dtype=torch.int64)
    greatest = at.local.new_zeros(sizes, dtype=torch.int32)  # float32's bits: none is negative
    rest = {k: v for k, v in given.items() if k not in ("x", "scale", "block_size", "global_scale")}
    rest["over"] = blocks
    for piece, parameters in _Beside(at, given, 1, blocks).pieces():
        part = at.part(at.local, piece)
        limbs, error, counts = functional("measure_limbs")(part, **{**rest, **parameters})
        here = at.place(piece, blocks, held)
        both[here] += torch.cat([limbs.flatten(-2), counts], -1)
        greatest[here] = torch.maximum(greatest[here], error.view(torch.int32))
    both, greatest = at.merged(both, "sum", blocks), at.merged(greatest, "max", blocks)
    if not shape:
        both, greatest = both.reshape(-1), greatest.reshape(())
    limbs = sums.carried(both[..., :-2].unflatten(-1, (2, sums.DIGITS)))
    made = [limbs, greatest.view(torch.float32), both[..., -2:].contiguous()]
    if name == "measure":
        made[:1] = (t.contiguous() for t in sums.rounded(limbs).unbind(-1))
    return tuple(at.of_blocks(t, blocks, (*shape, *t.shape[greatest.dim() :])) for t in made)


def _masked(name: str, given: _Arguments) -> DTensor:
    """The gradient of x: what comes, where the mask is."""
    grad, mask = given["grad"], given["mask"]
    at = _Shards(mask)
    grad = _local(grad, at.placements, at.mesh)
    return at.alike(functional(name)(grad, at.local))


def _backward(name: str, given: _Arguments) -> DTensor:
    mask = _call("_fake_quantize_masked", given)[1]
    return _call("_masked_gradient", {"grad": given["grad"], "mask": mask})


def _refused(name: str, given: _Arguments) -> Any:
    if name in GRADIENTS:
        raise RuntimeError("a scale or zero_point beside a DTensor gets no gradient")
    raise RuntimeError(f"{name}: expected plain tensors, got a DTensor; pass to_local()")


_RULES: dict[str, Callable[[str, _Arguments], Any]] = {
    **dict.fromkeys(("choose_qparams", "aminmax"), _choosing),
    **dict.fromkeys(("dynamic_quantize", "quantize_dequantize"), _dynamic),
    **dict.fromkeys(("measure", "measure_limbs"), _measuring),
    **dict.fromkeys(("quantize", "dequantize", "fake_quantize"), _with_parameters),
    **dict.fromkeys(("_fake_quantize", "_fake_quantize_masked"), _with_parameters),
    "_masked_gradient": _masked,
    "_fake_quantize_backward": _backward,
}


def _kernel(name: str, rule: Callable[[str, _Arguments], Any]) -> Callable[..., Any]:
    """What torch calls for an operator that gets a DTensor."""
    names = _names(name)

    def kernel(cls, func, types, args=(), kwargs=None):
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        if not isinstance(given[names[0]], DTensor):
            raise RuntimeError(f"{names[0]}: expected a DTensor, as another argument is one")
        try:
            OPERATORS[name].check(**given)
        except (TypeError, ValueError) as error:  # the functions raise the exact type
            raise RuntimeError(str(error)) from None
        with torch.no_grad():
            return rule(name, given)

    return kernel


_library = torch.library.Library("quantkit", "FRAGMENT")
for _name in (*OPERATORS, *GRADIENTS):
    _rule = _RULES.get(_name.partition(".")[0], _refused)
    _overload = functional(_name)
    torch.library.register_torch_dispatch(_overload, DTensor, _kernel(_name, _rule), lib=_library)
