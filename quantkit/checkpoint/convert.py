"""Tiles of weights on their way from one file to another: read ahead, computed, written behind.

One thread reads, one computes (with torch's own threads), one writes. Each tile has a buffer from the
first read to the last write, and there are a few buffers: that bounds the memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..ops import aminmax, dequantize_tensor, measure_limbs
from ..sums import join_measures
from .output import Sink
from .plan import TILE, Item, OutputFile, Plan
from .source import Buffer, CheckpointError, Region, Source, shown

BUFFERS = 4
_ALIGN = 64

# A part's name, a byte inside it, and the tensor whose bytes go there.
Put = tuple[str, int, torch.Tensor]


class Step(NamedTuple):
    """What is read at once; place: the first row, or the first byte of a copy."""

    task: Task
    regions: tuple[Region, ...]
    place: int
    extremes: bool = False


class Task:
    """A tensor that is copied: the simplest way of an item."""

    def __init__(self, item: Item) -> None:
        self.item = item

    def steps(self) -> Iterator[Step]:
        for place, region in self.item.inputs[0].tiles(TILE):
            yield Step(self, (region,), place)

    def compute(self, step: Step, tensors: list[torch.Tensor]) -> list[Put]:
        return [(self.item.name, step.place, tensors[0])]

    def row(self) -> dict[str, Any] | None:
        """What the report says about it."""
        return None

    def tiles(self) -> Iterator[tuple[int, int]]:
        """The first and the last row of each tile."""
        assert self.item.weight is not None
        rows, step = self.item.weight.shape[0], self.item.step
        for first in range(0, rows, step):
            yield first, min(first + step, rows)


class Quantize(Task):
    """A weight that is quantized, and measured on the way."""

    def __init__(self, item: Item, allow_nonfinite: bool, measured: bool) -> None:
        super().__init__(item)
        assert item.weight is not None
        self.scheme, self.shape, self.dtype = item.weight
        self._allow_nonfinite, self._measured = allow_nonfinite, measured
        self._ends: tuple[torch.Tensor, torch.Tensor] | None = None
        self._limbs, self._max_error = torch.zeros(2, 19, dtype=torch.int64), torch.zeros(())
        self._counts = torch.zeros(2, dtype=torch.int64)

    def steps(self) -> Iterator[Step]:
        for extremes in (True, False) if self.scheme.whole else (False,):
            for first, end in self.tiles():
                yield Step(self, (self.item.inputs[0].rows(first, end),), first, extremes)

    def compute(self, step: Step, tensors: list[torch.Tensor]) -> list[Put]:
        (x,) = tensors
        if step.extremes:
            ends = aminmax(x)
            if self._measured and not all(torch.isfinite(t) for t in ends):
                self._refuse(x, step.place)
            if self._ends is not None:
                ends = aminmax(torch.stack([*self._ends, *ends]))
            self._ends = ends
            return []
        q, params = self.scheme.quantize(x, self._ends)
        if self._measured:
            limbs, max_error, counts = measure_limbs(x, params)
            if counts[1] > 0:
                self._refuse(x, step.place)
            self._limbs += limbs
            self._counts += counts
            self._max_error = torch.maximum(self._max_error, max_error)
        return list(
            self.scheme.stored(self.item.name, q, params, step.place, self.shape, self.dtype)
        )

    def _refuse(self, x: torch.Tensor, first: int) -> None:
        """Say where the first number is that is not finite; errors alone may overflow, too."""
        places = torch.nonzero(~torch.isfinite(x))
        if len(places) and not self._allow_nonfinite:
            row, column = places[0].tolist()
            raise CheckpointError(
                f"{shown(self.item.name)}: has {x[row, column].item()} in row {first + row}, column "
                f"{column}; --allow-nonfinite takes it"
            )

    def row(self) -> dict[str, Any]:
        m = join_measures(self._limbs, self._max_error, self._counts)
        squares, errors = m.squares.item(), m.squared_errors.item()
        ratio = squares / errors if errors > 0 else 0.0
        return {
            "name": self.item.name,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "scheme": self.scheme.name,
            "sqnr_db": round(10 * math.log10(ratio), 4) if 0 < ratio < math.inf else None,
            "max_error": m.max_error.item(),
            "saturated": int(m.saturated),
            "left_out": int(m.left_out),
            "bytes_before": self.item.inputs[0].nbytes,
            "bytes_after": self.item.bytes_after,
        }


class Dequantize(Task):
    """A weight that becomes floats of its own dtype again."""

    def __init__(self, item: Item) -> None:
        super().__init__(item)
        assert item.weight is not None
        self.scheme, self.shape, self.dtype = item.weight
        self._parts = self.scheme.parts(item.name, self.shape, self.dtype)

    def steps(self) -> Iterator[Step]:
        for first, end in self.tiles():
            regions = []
            for part, region in zip(self._parts, self.item.inputs, strict=True):
                _, sizes = part.tile(first, end - first)
                begin = first // part.rows if part.rows else 0
                regions.append(region.rows(begin, begin + sizes[0]))
            yield Step(self, tuple(regions), first)

    def compute(self, step: Step, tensors: list[torch.Tensor]) -> list[Put]:
        names = [part.name for part in self._parts]
        count = min(self.item.step, self.shape[0] - step.place)
        tile = (count, self.shape[1])
        q, params = self.scheme.loaded(
            dict(zip(names, tensors, strict=True)), self.item.name, tile, self.dtype
        )
        x = dequantize_tensor(q, params, output_dtype=self.dtype)
        place = step.place * self.shape[1] * self.dtype.itemsize
        return [(self.item.name, place, x.contiguous())]


@dataclass
class _Tile:
    """A step under way."""

    step: Step
    buffer: Buffer
    read: Future[list[torch.Tensor]]
    write: Future[None] = field(default_factory=Future)


class Converter:
    """The threads and buffers that convert files, one after the other."""

    def __init__(
        self, source: Source, plan: Plan, *, allow_nonfinite: bool = False, measured: bool = True
    ) -> None:
        self._source = source
        self._allow_nonfinite, self._measured = allow_nonfinite, measured
        # The first step of a tensor is the largest one.
        firsts = (next(self._task(item).steps(), None) for item in plan.items)
        sizes = [sum(_aligned(r.nbytes) for r in step.regions) for step in firsts if step]
        largest = max(sizes, default=0)
        self._free = [Buffer(largest) for _ in range(BUFFERS)]
        self._writing: deque[_Tile] = deque()
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def __enter__(self) -> Converter:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._reader, self._writer):
            pool.shutdown(cancel_futures=True)

    def convert(
        self, file: OutputFile, sink: Sink, progress: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        """Give a sink all bytes of a file; returns the report's rows.

        progress: called with the number of bytes that were read.
        """
        tasks = [self._task(item) for item in file.items]
        steps = (step for task in tasks for step in task.steps())
        try:
            for step, tensors in self._read_ahead(steps):
                puts = step.task.compute(step, tensors)
                puts = [(name, file.layout.places[name] + at, t) for name, at, t in puts]
                self._writing[-1].write = self._writer.submit(_write, puts, sink)
                progress(sum(region.nbytes for region in step.regions))
        finally:  # nothing may write any more when the file is closed
            wait(tile.write for tile in self._writing if not tile.write.cancel())
        return [row for task in tasks if (row := task.row()) is not None]

    def _task(self, item: Item) -> Task:
        if item.weight is None:
            return Task(item)
        if item.back:
            return Dequantize(item)
        return Quantize(item, self._allow_nonfinite, self._measured)

    def _read_ahead(self, steps: Iterator[Step]) -> Iterator[tuple[Step, list[torch.Tensor]]]:
        """Each step with what it reads; its buffer is free again when what it makes is written."""
        reading: deque[_Tile] = deque()
        self._writing.clear()
        while True:
            while self._free and (step := next(steps, None)) is not None:
                buffer = self._free.pop()
                reading.append(_Tile(step, buffer, self._reader.submit(self._read, step, buffer)))
            if reading:
                tile = reading.popleft()
                tensors = tile.read.result()
                self._writing.append(tile)
                yield tile.step, tensors
            elif not self._writing:
                return
            must = not reading
            while self._writing and (must or self._writing[0].write.done()):
                tile = self._writing.popleft()
                tile.write.result()
                self._free.append(tile.buffer)
                must = False

    def _read(self, step: Step, buffer: Buffer) -> list[torch.Tensor]:
        tensors, at = [], 0
        for region in step.regions:
            tensors.append(self._source.read(region, buffer, at))
            at += _aligned(region.nbytes)
        return tensors


def _write(puts: list[Put], sink: Sink) -> None:
    for name, place, t in puts:
        sink.put(name, place, t)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
