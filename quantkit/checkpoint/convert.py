"""Tiles of weights on their way from one file to another.

Each thread takes a tile from its read over its numbers to its write, while others do the same with other
tiles. A tile has a buffer, and there are a few buffers: that bounds the memory.
"""

from __future__ import annotations

import ctypes
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import torch

from ..ops import aminmax, dequantize_tensor, measure_limbs
from ..sums import join_measures
from .files import Buffer, CheckpointError, Region, shown
from .output import Sink
from .plan import TILE, Item, OutputFile, Plan
from .source import Source

BUDGET = 64 << 20  # bytes of all tiles under way, before and after
_ALIGN = 64

# A part's name, a byte inside it, and the tensor whose bytes go there.
Put = tuple[str, int, torch.Tensor]


class Step(NamedTuple):
    """What a thread does at once.

    Attributes:
        place: the first row, or the first byte of a copy.
        extremes: whether it only looks for them.
        waits: whether the steps before it must have ended.
    """

    task: Task
    regions: tuple[Region, ...]
    place: int
    extremes: bool = False
    waits: bool = False


class Task:
    """A tensor that is copied: the simplest way of an item."""

    def __init__(self, item: Item) -> None:
        self.item = item

    def steps(self) -> Iterator[Step]:
        for place, region in self.item.inputs[0].tiles(TILE):
            yield Step(self, (region,), place)

    def compute(self, step: Step, tensors: list[torch.Tensor]) -> tuple[list[Put], Any]:
        """What is written, and what :meth:`take` gets; called by any thread."""
        return [(self.item.name, step.place, tensors[0])], None

    def take(self, step: Step, found: Any) -> None:
        """Join what the steps found, which come in order, in one thread."""

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
                region = self.item.inputs[0].rows(first, end)
                waits = self.scheme.whole and not extremes and first == 0
                yield Step(self, (region,), first, extremes, waits)

    def compute(self, step: Step, tensors: list[torch.Tensor]) -> tuple[list[Put], Any]:
        (x,) = tensors
        if step.extremes:
            ends = aminmax(x)
            if self._measured and not all(torch.isfinite(t) for t in ends):
                self._refuse(x, step.place)
            return [], ends
        q, params = self.scheme.quantize(x, self._ends)
        found = measure_limbs(x, params) if self._measured else None
        if found is not None and found[2][1] > 0:
            self._refuse(x, step.place)
        name = self.item.name
        stored = self.scheme.stored(name, q, params, step.place, self.shape, self.dtype)
        return list(stored), found

    def take(self, step: Step, found: Any) -> None:
        if step.extremes:
            both = found if self._ends is None else aminmax(torch.stack([*self._ends, *found]))
            self._ends = both
        elif found is not None:
            limbs, max_error, counts = found
            self._limbs += limbs
            self._counts += counts
            self._max_error = torch.maximum(self._max_error, max_error)

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
        sqnr_db = 10 * math.log10(squares / errors) if squares > 0 and errors > 0 else None
        if sqnr_db is None and m.left_out > 0:
            sqnr_db = 0.0
        figures = {
            "sqnr_db": None if sqnr_db is None else round(sqnr_db, 4),
            "max_error": m.max_error.item(),
            "saturated": int(m.saturated),
            "left_out": int(m.left_out),
        }
        return row_of(self.item, figures)


FIGURES = ("sqnr_db", "max_error", "saturated", "left_out")  # what is measured


def row_of(item: Item, figures: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the report; figures are those of FIGURES."""
    assert item.weight is not None
    scheme, shape, dtype = item.weight
    return {
        "name": item.name,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "scheme": scheme.name,
        **figures,
        "bytes_before": item.inputs[0].nbytes,
        "bytes_after": item.bytes_after,
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

    def compute(self, step: Step, tensors: list[torch.Tensor]) -> tuple[list[Put], Any]:
        names = [part.name for part in self._parts]
        count = min(self.item.step, self.shape[0] - step.place)
        tile = (count, self.shape[1])
        q, params = self.scheme.loaded(
            dict(zip(names, tensors, strict=True)), self.item.name, tile, self.dtype
        )
        x = dequantize_tensor(q, params, output_dtype=self.dtype)
        place = step.place * self.shape[1] * self.dtype.itemsize
        return [(self.item.name, place, x.contiguous())], None


class Converter:
    """The threads and buffers that convert files, one after the other.

    Args:
        threads: how many compute. torch's own are 1 meanwhile: each has a tile of its own.
    """

    def __init__(
        self, source: Source, plan: Plan, *, threads: int | None = None,
        allow_nonfinite: bool = False, measured: bool = True,
    ) -> None:  # fmt: skip
        self._source = source
        self._allow_nonfinite, self._measured = allow_nonfinite, measured
        self._threads_before = torch.get_num_threads()
        workers = (threads or self._threads_before) + 1  # one more, as some wait for the disk
        # The first step of a tensor is the largest one.
        firsts = (next(self._task(item).steps(), None) for item in plan.items)
        largest = max((_bytes_of(step) for step in firsts if step), default=0)
        floats = max((item.tile_bytes for item in plan.items), default=0)
        count = min(workers + 1, max(2, BUDGET // max(largest + floats, 1)))
        self._free = [Buffer(largest) for _ in range(count)]
        self._pool = ThreadPoolExecutor(min(workers, count))
        # glibc keeps what threads free, hundreds of MB of many or large tiles, unless it is told not to.
        large = floats > TILE or count > 4
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if large else None

    def __enter__(self) -> Converter:
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._threads_before)

    def convert(
        self, file: OutputFile, sink: Sink, progress: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        """Give a sink all bytes of a file; returns the report's rows.

        progress: called with the number of bytes that were read.
        """
        tasks = [self._task(item) for item in file.items]
        running: deque[tuple[Step, Buffer, Future[Any]]] = deque()

        def collect() -> None:
            step, buffer, future = running.popleft()
            step.task.take(step, future.result())
            self._free.append(buffer)
            if self._trim is not None:
                self._trim(0)
            progress(sum(region.nbytes for region in step.regions))

        try:
            for step in (step for task in tasks for step in task.steps()):
                while running and (step.waits or not self._free):
                    collect()
                buffer = self._free.pop()
                running.append(
                    (step, buffer, self._pool.submit(self._work, step, buffer, file, sink))
                )
            while running:
                collect()
        finally:  # nothing may write any more when the file is closed
            wait([future for _, _, future in running if not future.cancel()])
        return [row for task in tasks if (row := task.row()) is not None]

    def _task(self, item: Item) -> Task:
        if item.weight is None:
            return Task(item)
        if item.back:
            return Dequantize(item)
        return Quantize(item, self._allow_nonfinite, self._measured)

    def _work(self, step: Step, buffer: Buffer, file: OutputFile, sink: Sink) -> Any:
        tensors, at = [], 0
        for region in step.regions:
            tensors.append(self._source.read(region, buffer, at))
            at += _aligned(region.nbytes)
        puts, found = step.task.compute(step, tensors)
        for name, place, t in puts:
            sink.put(name, file.layout.places[name] + place, t)
        return found


def _bytes_of(step: Step) -> int:
    return sum(_aligned(region.nbytes) for region in step.regions)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
