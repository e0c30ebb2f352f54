"""A checkpoint to read: names, shapes and places from headers alone, then bytes by ``pread``.

Files may come from anyone. Everything that a header says is checked against the file's size before
memory is taken for it, and what is wrong is one :class:`CheckpointError` of one line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from .files import (
    DTYPES,
    MAX_HEADER,
    Buffer,
    CheckpointError,
    Region,
    check_name,
    opened,
    parsed,
    pread,
    pread_into,
    shown,
    span_of,
)  # fmt: skip
from .pickled import read_archive

# Bytes that are read at once of tensors whose elements lie apart; few are read anyway.
_SCRATCH, _NEAR = 8 << 20, 1 << 16
_CHUNK = 1 << 20  # bytes, of small files
PICKLED = (".pt", ".pth", ".bin")
# Weights in formats that are not read here: they would lie beside the quantized ones.
OTHER_WEIGHTS = (
    ".safetensors", *PICKLED, ".ckpt", ".gguf", ".ggml", ".h5", ".keras", ".msgpack", ".npz", ".onnx",
    ".onnx_data", ".ot", ".pdparams", ".pickle", ".pkl", ".tflite",
)  # fmt: skip


class File(NamedTuple):
    """A file of the source; name is relative to its folder."""

    name: str
    path: Path
    size: int
    mtime_ns: int


class Source:
    """All tensors of a checkpoint, which stay in their files until :meth:`read` is called.

    Args:
        path: a folder with an index and its shards or with one file of weights; or a file: .safetensors,
            or .pt, .pth or .bin of torch.save.

    Attributes:
        files: those that have weights, in the order of their names.
        tensors: where each tensor lies, by name, in the order of the files.
        metadata: of each file's header.
        config: what config.json says; empty without one.
        others: files to copy, relative to the folder.
        left_out: what is not copied, each with a reason.
        shared: names of tensors that share memory with another one: tied weights of a .pt file.

    Raises:
        CheckpointError that says in one line what is wrong.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._opened: dict[int, int] = {}
        given = Path(path)
        if not given.exists():
            raise CheckpointError(f"{shown(given)}: there is no such file or folder")
        self.path = given
        self.folder = given.resolve() if given.is_dir() else None
        self.files: list[File] = []
        self.tensors: dict[str, Region] = {}
        self.metadata: list[dict[str, str]] = []
        self.config: dict[str, Any] = {}
        self.others: list[str] = []
        self.left_out: dict[str, str] = {}
        self.shared: set[str] = set()
        self._index = ""  # of the shards that are read
        try:
            self._read_headers()
        except BaseException:
            self.close()
            raise

    def _read_headers(self) -> None:
        names: Mapping[str, set[str] | None] = {self.path.name: None}
        if self.folder is not None:
            names = self._files_of_folder(self.folder)
        for name in sorted(names):
            self._add(name, names[name])
        if not self.tensors:
            raise CheckpointError(f"{shown(self.path)}: has no tensors")
        if self.folder is not None:
            self._list_others(self.folder, {*names, self._index})

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an open checkpoint cannot be copied or pickled: open it again")

    def close(self) -> None:
        while self._opened:
            os.close(self._opened.popitem()[1])

    # ---- headers --------------------------------------------------------------------------------------

    def _files_of_folder(self, folder: Path) -> dict[str, set[str] | None]:
        """The files of weights, each with the names that the index gives it; None without an index."""
        here = sorted(os.listdir(folder))
        for ending, endings in ((".safetensors", (".safetensors",)), (".bin", PICKLED)):
            indexes = [n for n in here if n.endswith(ending + ".index.json")]
            usual = [n for n in indexes if n.startswith(("model.", "pytorch_model."))]
            if len(usual or indexes) > 1:
                raise CheckpointError(
                    f"{shown(folder)}: expected one index, found {shown(', '.join(indexes))}"
                )
            if indexes:
                return self._shards(folder, (usual or indexes)[0], ending)
            found = [n for n in here if n.endswith(endings)]
            usual = [n for n in found if n in ("model.safetensors", "pytorch_model.bin")]
            if len(usual or found) > 1:
                raise CheckpointError(
                    f"{shown(folder)}: {len(found)} files of weights, but no index.json that says "
                    f"which belong together: {shown(', '.join(found))}"
                )
            if found:
                return {(usual or found)[0]: None}
        if (folder / "snapshots").is_dir():
            found = sorted(os.listdir(folder / "snapshots"))
            raise CheckpointError(
                f"{shown(folder)}: has no weights: expected a folder of its snapshots: "
                f"{shown(', '.join(found))}"
            )
        raise CheckpointError(
            f"{shown(folder)}: has no weights: expected .safetensors, {', '.join(PICKLED)} or an index"
        )

    def _shards(self, folder: Path, index: str, ending: str) -> dict[str, set[str] | None]:
        self._index = index
        weight_map = parsed(self.small(index), index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{shown(index)}: has no weight_map of names and files")
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            plain = isinstance(file, str) and not set(file) & set("/\\\0") and file.endswith(ending)
            if not plain:
                raise CheckpointError(
                    f"{shown(index)}: {shown(name)}: expected the name of a {ending} file in this "
                    f"folder, got {shown(file)}"
                )
            files.setdefault(file, set()).add(name)
        missing = [file for file in sorted(files) if not (folder / file).exists()]
        if missing:
            raise CheckpointError(f"{shown(index)}: the file {shown(missing[0])} is missing")
        return dict(files)

    def small(self, name: str) -> bytes:
        """What a small file of the folder holds."""
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """The same, a part at a time."""
        assert self.folder is not None
        fd, info = opened(self._inside(self.folder, name))
        try:
            if info.st_size > MAX_HEADER:
                raise CheckpointError(f"{shown(name)}: has {info.st_size} bytes, over {MAX_HEADER}")
            for place in range(0, info.st_size, _CHUNK):
                yield bytes(pread(fd, place, min(_CHUNK, info.st_size - place), name))
        finally:
            os.close(fd)

    def _inside(self, folder: Path, name: str) -> Path:
        """The path of a name; a link may lead to this folder, or to the blobs of a cache."""
        path = Path(os.path.realpath(folder / name))  # resolve() raises where links form a loop
        roots = [folder]
        if folder.parent.name == "snapshots":
            roots.append(folder.parent.parent / "blobs")
        if not any(path.is_relative_to(root) for root in roots):
            raise CheckpointError(f"{shown(folder / name)}: a link that leads out of the folder")
        return path

    def _add(self, name: str, expected: set[str] | None) -> None:
        path = self.path if self.folder is None else self._inside(self.folder, name)
        fd, info = opened(path)
        index = len(self.files)
        self.files.append(File(name, path, info.st_size, info.st_mtime_ns))
        self._opened[index] = fd
        if name.endswith(".safetensors"):
            tensors, metadata = read_header(fd, info.st_size, index, name)
        elif name.endswith(PICKLED):
            tensors, left_out, shared = read_archive(path, info.st_size, index, name)
            self.left_out |= left_out
            self.shared |= shared
            metadata = {}
        else:
            endings = ", ".join((".safetensors", *PICKLED))
            raise CheckpointError(f"{shown(name)}: expected a folder or a file of {endings}")
        self.metadata.append(metadata)
        if expected is not None and expected != set(tensors):
            odd = min(expected ^ set(tensors))
            where = (
                "has no tensor" if odd in expected else "has a tensor that the index gives it not:"
            )
            raise CheckpointError(f"{shown(name)}: {where} {shown(odd)}")
        self.tensors |= tensors

    # ---- other files ----------------------------------------------------------------------------------

    def _list_others(self, folder: Path, read: set[str]) -> None:
        def unreadable(error: OSError) -> None:
            name = Path(error.filename).relative_to(folder)
            self.left_out[f"{name}/"] = error.strerror or str(error)

        for root, folders, names in os.walk(folder, onerror=unreadable):
            inner = Path(root).relative_to(folder)
            for name in sorted(folders):
                if name.startswith(".") or (Path(root) / name).is_symlink():
                    folders.remove(name)
                    self.left_out[f"{inner / name}/"] = "hidden" if name[0] == "." else "a link"
            folders.sort()
            for name in sorted(names):
                relative = str(inner / name)
                if relative in read:
                    continue
                reason = self._why_not(folder, relative, name)
                if reason:
                    self.left_out[relative] = reason
                else:
                    self.others.append(relative)
        if why := self.left_out.get("config.json"):
            raise CheckpointError(f"config.json: {why}")
        if "config.json" in self.others:
            self.config = parsed(self.small("config.json"), "config.json")

    def _why_not(self, folder: Path, relative: str, name: str) -> str:
        """Why a file is not copied; an empty text where it is."""
        if name.startswith("."):
            return "hidden"
        if name.removesuffix(".part").endswith((*OTHER_WEIGHTS, ".index.json")):
            return "other weights"
        if any("\udc80" <= c <= "\udcff" for c in relative):
            return "its name is no Unicode text"
        path = self._inside(folder, relative)
        if not path.exists():
            raise CheckpointError(f"{shown(relative)}: a link that leads nowhere")
        if not path.is_file():
            return "no regular file"
        return f"over {MAX_HEADER} bytes" if path.stat().st_size > MAX_HEADER else ""

    def folders(self) -> set[Path]:
        """Those in which files of the source lie, links followed."""
        paths = [file.path for file in self.files]
        if self.folder is not None:
            paths += [self.folder / name for name in self.others]
        given = set() if self.folder else {self.path.absolute().parent}
        return given | {Path(os.path.realpath(path)).parent for path in paths}

    # ---- bytes ----------------------------------------------------------------------------------------

    def read(self, region: Region, buffer: Buffer, at: int = 0) -> torch.Tensor:
        """The elements of a region, contiguous, in the buffer's memory from byte ``at`` on."""
        fd = self._fd(region.file)
        out = buffer.tensor[at : at + region.nbytes].view(region.dtype).view(region.shape)
        if region.strides is None:
            memory = memoryview(buffer.bytes)[at : at + region.nbytes]
            pread_into(fd, region.offset, memory, self.files[region.file].name)
        else:
            span = span_of(region.shape, region.strides) * region.dtype.itemsize
            self._gather(fd, region, out, Buffer(min(span, _SCRATCH)))
        return out

    def _gather(self, fd: int, region: Region, out: torch.Tensor, scratch: Buffer) -> None:
        """By halves, until what lies between a part's first and last element is worth reading."""
        assert region.strides is not None
        span = span_of(region.shape, region.strides) * region.dtype.itemsize
        if span <= _NEAR or (span <= _SCRATCH and span <= 4 * region.nbytes):
            name = self.files[region.file].name
            pread_into(fd, region.offset, memoryview(scratch.bytes)[:span], name)
            flat = scratch.tensor[:span].view(region.dtype)
            out.copy_(flat.as_strided(region.shape, region.strides))
            return
        reach = [(n - 1) * s for n, s in zip(region.shape, region.strides, strict=True)]
        dim = reach.index(max(reach))
        half = region.shape[dim] // 2
        for first, end in ((0, half), (half, region.shape[dim])):
            shape = (*region.shape[:dim], end - first, *region.shape[dim + 1 :])
            offset = region.offset + first * region.strides[dim] * region.dtype.itemsize
            part = region._replace(shape=shape, offset=offset)
            self._gather(fd, part, out.narrow(dim, first, end - first), scratch)

    def _fd(self, index: int) -> int:
        file = self.files[index]
        if index not in self._opened:
            raise CheckpointError(f"{shown(file.name)}: is closed")
        info = os.fstat(self._opened[index])
        if (info.st_size, info.st_mtime_ns) != (file.size, file.mtime_ns):
            raise CheckpointError(f"{shown(file.name)}: it changed while it was read")
        return self._opened[index]


def read_header(
    fd: int, size: int, index: int, name: str
) -> tuple[dict[str, Region], dict[str, str]]:
    """The tensors of a safetensors file, in the order of their places, and its metadata."""
    what = shown(name)
    length = int.from_bytes(pread(fd, 0, min(8, size), name), "little")
    if size < 8 or length > size - 8:
        raise CheckpointError(f"{what}: has {size} bytes, too few for its header")
    if length > MAX_HEADER:
        raise CheckpointError(f"{what}: its header has {length} bytes, over {MAX_HEADER}")
    header = parsed(pread(fd, 8, length, name), name)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{what}: its __metadata__ is no object of strings")
    places: list[tuple[int, int, str, Region]] = []
    for key, entry in header.items():
        check_name(key, name)
        region, end = _checked(entry, f"{what}: {shown(key)}")
        places.append((region.offset, end, key, region))
    places.sort(key=lambda p: p[:3])
    at = 0
    for begin, end, key, _ in places:
        if begin != at:
            where = "overlaps what lies before it" if begin < at else "begins after a gap"
            raise CheckpointError(f"{what}: {shown(key)}: {where}")
        at = end
    if at != size - 8 - length:
        raise CheckpointError(
            f"{what}: its tensors end at byte {8 + length + at}, the file at byte {size}"
        )
    tensors = {
        key: region._replace(file=index, offset=8 + length + begin)
        for begin, _, key, region in places
    }
    return tensors, metadata


def _checked(entry: Any, what: str) -> tuple[Region, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what}: expected dtype, shape and data_offsets in the header")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{what}: its dtype {shown(entry['dtype'], 40)} is not known")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise CheckpointError(f"{what}: expected sizes and offsets of 0 or more")
        if len(numbers) > 64 or any(n >= 1 << 63 for n in numbers):
            raise CheckpointError(f"{what}: its sizes or offsets are no int64")
    if len(offsets) != 2 or math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{what}: its shape and dtype take {math.prod(shape) * dtype.itemsize} bytes, "
            f"its data_offsets are {shown(offsets, 80)}"
        )
    return Region(0, offsets[0], tuple(shape), dtype), offsets[1]
