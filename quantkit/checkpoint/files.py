"""Files that may come from anyone: what is read of them, where it lies, and how it is shown."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._checks import wrong

MAX_HEADER = 100_000_000  # bytes, as safetensors has it; of an index and of a copied file too
_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16",
    "U8": "uint8", "BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in _NAMES.items()}
Path_ = str | os.PathLike[str]


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, a plan or a folder, in one line."""


def shown(text: object, limit: int = 200) -> str:
    """Text of a file as a terminal may have it: control characters are escaped."""
    short = str(text) if len(str(text)) <= limit else str(text)[:limit] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)


def path_of(name: str, value: Path_) -> Path:
    """An argument that is a path; name is the argument's."""
    path: object = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise wrong(TypeError, name, "a str or an os.PathLike of one", type(value).__name__)
    return Path(path)


class Region(NamedTuple):
    """Elements of a file: all of a tensor, or a box of it.

    Attributes:
        file: an index of ``Source.files``.
        offset: of the first element, in bytes.
        strides: in elements; None where the elements lie one after the other.
    """

    file: int
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, end: int) -> Region:
        step = math.prod(self.shape[1:]) if self.strides is None else self.strides[0]
        offset = self.offset + first * step * self.dtype.itemsize
        return self._replace(offset=offset, shape=(end - first, *self.shape[1:]))

    def tiles(self, limit: int) -> Iterator[tuple[int, Region]]:
        """Boxes of at most ``limit`` bytes, each with its place in a contiguous copy, in bytes."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        if self.nbytes <= limit:
            if self.nbytes:
                yield 0, self
        elif self.strides is None:  # then its shape does not matter
            flat = self._replace(shape=(math.prod(self.shape),))
            count = limit // self.dtype.itemsize
            for first in range(0, flat.shape[0], count):
                end = min(first + count, flat.shape[0])
                yield first * self.dtype.itemsize, flat.rows(first, end)
        elif row <= limit:
            for first in range(0, self.shape[0], limit // row):
                yield first * row, self.rows(first, min(first + limit // row, self.shape[0]))
        else:
            for index in range(self.shape[0]):
                one = self.rows(index, index + 1)
                inner = one._replace(shape=one.shape[1:], strides=self.strides[1:])
                for place, tile in inner.tiles(limit):
                    yield index * row + place, tile


class Buffer:
    """Memory that reads go into; bytes, so that no package but torch is needed."""

    def __init__(self, size: int) -> None:
        self.bytes = bytearray(max(size, 16))
        self.tensor = torch.frombuffer(self.bytes, dtype=torch.uint8)


def span_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def opened(path: Path) -> tuple[int, os.stat_result]:
    """A regular file, open for reading: no pipe that waits, no device that never ends."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{shown(path)}: {error.strerror}") from None
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise CheckpointError(f"{shown(path)}: is no regular file")
    return fd, info


def pread_into(fd: int, offset: int, memory: memoryview, name: str) -> None:
    while memory:
        count = os.preadv(fd, [memory], offset)
        if count == 0:
            raise CheckpointError(f"{shown(name)}: it ends at byte {offset}: it shrank")
        memory, offset = memory[count:], offset + count


def pread(fd: int, offset: int, size: int, name: str) -> bytearray:
    data = bytearray(size)
    pread_into(fd, offset, memoryview(data), name)
    return data


def parsed(data: bytes | bytearray, name: str) -> dict[str, Any]:
    """A JSON object; a name that comes twice in one is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = next(key for key, count in counts.items() if count > 1)
            raise CheckpointError(f"{shown(name)}: {shown(twice)} comes twice")
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{shown(name)}: is no JSON: {shown(reason)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{shown(name)}: expected a JSON object, got {type(value).__name__}")
    return value


def check_name(key: str, name: str) -> None:
    try:
        key.encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(f"{shown(name)}: {ascii(key)[:99]} is no Unicode text") from None
    if key == "__metadata__":
        raise CheckpointError(
            f"{shown(name)}: a tensor is called {key}, which safetensors reserves"
        )
