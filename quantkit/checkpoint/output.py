"""One safetensors file of known layout: written at any place, and whole when it gets its name.

Space is reserved before the first byte, so a full disk is an error and no signal. The file is called
``NAME.part`` until all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from .files import DTYPES, CheckpointError, opened, pread, pread_into, shown
from .layouts import Part

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(CheckpointError):
    """There is no space for what has to be written."""


class Layout(NamedTuple):
    """A file before it has data: its header, where each tensor begins, how many bytes it has."""

    header: bytes
    places: dict[str, int]
    size: int


def layout_of(parts: Iterable[Part], metadata: Mapping[str, str]) -> Layout:
    """The layout of these tensors. Larger items come first, so that each is aligned."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    places: dict[str, int] = {}
    at = 0
    for part in sorted(parts, key=lambda p: (-p.dtype.itemsize, p.name)):
        end = at + math.prod(part.shape) * part.dtype.itemsize
        header[part.name] = {
            "dtype": _NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [at, end],
        }
        places[part.name], at = at, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    header_bytes = len(text).to_bytes(8, "little") + text
    return Layout(header_bytes, {k: start + v for k, v in places.items()}, start + at)


class Sink(Protocol):
    """Where the bytes of an output file go: to a disk, or to a comparison."""

    def put(self, name: str, place: int, t: torch.Tensor) -> None:
        """Take a contiguous tensor's bytes for a place in the file; name is of the part."""
        ...


class Writer:
    """A file that is written by ``pwrite``; :meth:`finish` gives it its name."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.part, self.size = path, path.with_name(path.name + ".part"), layout.size
        self._fd = -1
        try:  # a signal may come as soon as the file is there
            self._fd = created(self.part)
            reserve(self._fd, layout.size, self.part)
            self._write(memoryview(layout.header), 0)
        except BaseException:
            self.abandon()
            raise

    def put(self, name: str, place: int, t: torch.Tensor) -> None:
        self._write(memory_of(t), place)

    def _write(self, memory: memoryview, place: int) -> None:
        with no_space_for(self.part, self.size):
            while memory:
                count = os.pwrite(self._fd, memory, place)
                memory, place = memory[count:], place + count

    def finish(self) -> None:
        with no_space_for(self.part, self.size):  # where a network's file system reports it
            os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        os.replace(self.part, self.path)
        sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.part.unlink(missing_ok=True)


class Comparer:
    """A file that should have these bytes already; ``differing`` has the names of those that do not."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.name = path.name
        self.differing: dict[str, None] = {}
        self._fd, info = opened(path)
        same = info.st_size == layout.size
        if not same or pread(self._fd, 0, len(layout.header), self.name) != layout.header:
            os.close(self._fd)
            raise CheckpointError(f"{shown(path.name)}: its header or its size differs")

    def put(self, name: str, place: int, t: torch.Tensor) -> None:
        there = torch.empty_like(t)
        pread_into(self._fd, place, memory_of(there), self.name)
        if memory_of(there) != memory_of(t):
            self.differing[name] = None

    def close(self) -> None:
        os.close(self._fd)


def memory_of(t: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which must outlive them."""
    kind = ctypes.c_char * (t.numel() * t.element_size())
    return memoryview(kind.from_address(t.data_ptr())).cast("B") if t.numel() else memoryview(b"")


def created(path: Path) -> int:
    """A new file in the place of whatever is there, such as a link."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def reserve(fd: int, size: int, path: Path) -> None:
    """Take the space of a file from the disk, or raise DiskFull."""
    try:
        os.posix_fallocate(fd, 0, size)
    except (AttributeError, OSError) as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in _FULL:
            raise full(path, size) from None
        if code not in (None, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        if free_space(path.parent) < size:
            raise full(path, size) from None
        os.ftruncate(fd, size)


def full(path: Path, size: int) -> DiskFull:
    free = free_space(path.parent)
    return DiskFull(f"{shown(path)}: no space: it needs {size} bytes, {free} are free")


@contextlib.contextmanager
def no_space_for(path: Path, size: int | None = None) -> Iterator[None]:
    """An error of the system that means a full disk becomes DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        if size is not None:
            raise full(path, size) from None
        raise DiskFull(f"{shown(error.filename or path)}: no space: {error.strerror}") from None


def free_space(folder: Path) -> int:
    info = os.statvfs(folder)
    return info.f_bavail * info.f_frsize


def write_whole(path: Path, data: Iterable[bytes], part: Path) -> None:
    """A small file, which is there with all its bytes or not at all; part is where they gather."""
    try:
        with no_space_for(path), open(created(part), "wb") as file:
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def as_json(value: object) -> bytes:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # half a surrogate pair, as JSON escapes it
