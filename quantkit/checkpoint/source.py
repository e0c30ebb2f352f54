"""A checkpoint to read: names, shapes and places from headers alone, then bytes by ``pread``.

Files may come from anyone. Everything that a header says is checked against the file's size before
memory is taken for it, and what is wrong is one :class:`CheckpointError` of one line.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

MAX_HEADER = 100_000_000  # bytes, as safetensors has it; of an index and of a copied file too
# Bytes that are read at once of tensors whose elements lie apart; few are read anyway.
_SCRATCH, _NEAR = 8 << 20, 1 << 16
PICKLED = (".pt", ".pth", ".bin")
# Weights in formats that are not read here: they would lie beside the quantized ones.
OTHER_WEIGHTS = (
    ".safetensors", *PICKLED, ".ckpt", ".gguf", ".ggml", ".h5", ".keras", ".msgpack", ".npz", ".onnx",
    ".onnx_data", ".ot", ".pdparams", ".pickle", ".pkl", ".tflite",
)  # fmt: skip
_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16",
    "U8": "uint8", "BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in _NAMES.items()}


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, a plan or a folder, in one line."""


def shown(text: object, limit: int = 200) -> str:
    """Text of a file as a terminal may have it: control characters are escaped."""
    short = str(text) if len(str(text)) <= limit else str(text)[:limit] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)


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
            flat, count = (
                self._replace(shape=(math.prod(self.shape),)),
                limit // self.dtype.itemsize,
            )
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


class File(NamedTuple):
    """A file of the source; name is relative to its folder."""

    name: str
    path: Path
    size: int
    mtime_ns: int


class Buffer:
    """Memory that reads go into; bytes, so that no package but torch is needed."""

    def __init__(self, size: int) -> None:
        self.bytes = bytearray(max(size, 16))
        self.tensor = torch.frombuffer(self.bytes, dtype=torch.uint8)


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
        self._opened: dict[int, int] = {}
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
            self._list_others(self.folder, set(names))

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._opened:
            os.close(self._opened.popitem()[1])

    # ---- headers --------------------------------------------------------------------------------------

    def _files_of_folder(self, folder: Path) -> dict[str, set[str] | None]:
        """The files of weights, each with the names that the index gives it; None without an index."""
        here = sorted(os.listdir(folder))
        for ending in (".safetensors", ".bin"):
            indexes = [n for n in here if n.endswith(ending + ".index.json")]
            usual = [n for n in indexes if n.startswith(("model.", "pytorch_model."))]
            if len(usual or indexes) > 1:
                raise CheckpointError(f"{shown(folder)}: expected one index, found {indexes}")
            if indexes:
                return self._shards(folder, (usual or indexes)[0], ending)
        for endings in ((".safetensors",), PICKLED):
            found = [n for n in here if n.endswith(endings)]
            usual = [n for n in found if n in ("model.safetensors", "pytorch_model.bin")]
            if len(usual or found) > 1:
                raise CheckpointError(
                    f"{shown(folder)}: {len(found)} files of weights, but no index.json that says "
                    f"which belong together: {shown(', '.join(found))}"
                )
            if found:
                return {(usual or found)[0]: None}
        raise CheckpointError(
            f"{shown(folder)}: has no weights: expected .safetensors, {', '.join(PICKLED)} or an index"
        )

    def _shards(self, folder: Path, index: str, ending: str) -> dict[str, set[str] | None]:
        weight_map = self._json(folder, index).get("weight_map")
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

    def _json(self, folder: Path, name: str) -> dict[str, Any]:
        path = self._inside(folder, name)
        fd, info = opened(path)
        try:
            if info.st_size > MAX_HEADER:
                raise CheckpointError(f"{shown(name)}: has {info.st_size} bytes, over {MAX_HEADER}")
            return parsed(pread(fd, 0, info.st_size, name), name)
        finally:
            os.close(fd)

    def _inside(self, folder: Path, name: str) -> Path:
        """The path of a name; a link may lead to this folder, or to the blobs of a cache."""
        path = (folder / name).resolve()
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
            tensors, metadata = self._pickled(path, info, index, name), {}
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

    def _pickled(
        self, path: Path, info: os.stat_result, index: int, name: str
    ) -> dict[str, Region]:
        """Places of the tensors that torch.load makes of a mapped file, which is not read for it."""
        _check_archive(path, name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch's loader raises what its unpickler meets
            text = str(error).strip() or type(error).__name__
            found = re.search(r"nsupported (?:global: )?GLOBAL (\S+)", text)
            reason = (
                f"it asks for {found[1]}, which is no weight" if found else text.splitlines()[0]
            )
            raise CheckpointError(f"{shown(name)}: {shown(reason)}") from None
        if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
            state = state["state_dict"]
        if not isinstance(state, Mapping):
            kind = type(state).__name__
            raise CheckpointError(f"{shown(name)}: expected a dict of tensors, got {kind}")
        tensors: dict[str, Region] = {}
        spans: list[tuple[int, int, str]] = []
        mapped = _mapped(path)
        for key, t in state.items():
            if not isinstance(key, str) or not isinstance(t, torch.Tensor):
                self.left_out[f"{name}: {key}"] = f"no tensor, but {type(t).__name__}"
                continue
            check_name(key, name)
            region = _place_of(t.detach(), mapped, info.st_size, f"{shown(name)}: {shown(key)}")
            tensors[key] = region._replace(file=index)
            span = _span(region.shape, t.stride()) * t.element_size()
            spans.append((region.offset, region.offset + span, key))
        self.shared |= _overlapping(spans)
        return tensors

    # ---- other files ----------------------------------------------------------------------------------

    def _list_others(self, folder: Path, weights: set[str]) -> None:
        for root, folders, names in os.walk(folder):
            inner = Path(root).relative_to(folder)
            for name in sorted(folders):
                if name.startswith(".") or (Path(root) / name).is_symlink():
                    folders.remove(name)
                    self.left_out[f"{inner / name}/"] = "hidden" if name[0] == "." else "a link"
            folders.sort()
            for name in sorted(names):
                relative = str(inner / name)
                reason = None if relative not in weights else ""
                if reason is None and name.startswith("."):
                    reason = "hidden"
                elif reason is None and name.endswith((*OTHER_WEIGHTS, ".index.json")):
                    reason = "other weights"
                elif reason is None:
                    path = self._inside(folder, relative)
                    if not path.is_file():
                        reason = "no regular file"
                    elif path.stat().st_size > MAX_HEADER:
                        reason = f"over {MAX_HEADER} bytes"
                if reason is None:
                    check_name(relative, "file")
                    self.others.append(relative)
                elif reason:
                    self.left_out[relative] = reason
        if "config.json" in self.others:
            self.config = self._json(folder, "config.json")

    def other(self, relative: str) -> bytes:
        """What a small file holds."""
        assert self.folder is not None
        fd, info = opened(self._inside(self.folder, relative))
        try:
            return pread(fd, 0, min(info.st_size, MAX_HEADER), relative)
        finally:
            os.close(fd)

    # ---- bytes ----------------------------------------------------------------------------------------

    def read(self, region: Region, buffer: Buffer, at: int = 0) -> torch.Tensor:
        """The elements of a region, contiguous, in the buffer's memory from byte ``at`` on."""
        fd = self._fd(region.file)
        out = buffer.tensor[at : at + region.nbytes].view(region.dtype).view(region.shape)
        if region.strides is None:
            memory = memoryview(buffer.bytes)[at : at + region.nbytes]
            pread_into(fd, region.offset, memory, self.files[region.file].name)
        else:
            span = _span(region.shape, region.strides) * region.dtype.itemsize
            self._gather(fd, region, out, Buffer(min(span, _SCRATCH)))
        return out

    def _gather(self, fd: int, region: Region, out: torch.Tensor, scratch: Buffer) -> None:
        """By halves, until what lies between a part's first and last element is worth reading."""
        assert region.strides is not None
        span = _span(region.shape, region.strides) * region.dtype.itemsize
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
        file, info = self.files[index], os.fstat(self._opened[index])
        if (info.st_size, info.st_mtime_ns) != (file.size, file.mtime_ns):
            raise CheckpointError(f"{shown(file.name)}: it changed while it was read")
        return self._opened[index]


# ---- files --------------------------------------------------------------------------------------------


def opened(path: Path) -> tuple[int, os.stat_result]:
    """A regular file, open for reading: no pipe that waits, no device that never ends."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
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


def pread(fd: int, offset: int, size: int, name: str) -> bytes:
    data = bytearray(size)
    pread_into(fd, offset, memoryview(data), name)
    return bytes(data)


def parsed(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object; a name that comes twice in one is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
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
    at = 0
    for begin, end, key, _ in sorted(places, key=lambda p: p[:3]):
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
        for begin, _, key, region in sorted(places, key=lambda p: p[:3])
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


# ---- tensors of a mapped file -------------------------------------------------------------------------


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _check_archive(path: Path, name: str) -> None:
    """What torch.load would not say in one line, would unpack into memory, or would swap there."""
    what = shown(name)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(
                "/code/" in e.filename or e.filename.endswith("/constants.pkl") for e in entries
            ):
                raise CheckpointError(f"{what}: is TorchScript: save its state_dict() instead")
            for e in entries:
                too_large = e.filename.endswith(".pkl") and e.file_size > MAX_HEADER
                if e.compress_type != zipfile.ZIP_STORED or too_large:
                    raise CheckpointError(f"{what}: {shown(e.filename)}: torch.save writes no such")
                if e.filename.endswith("/byteorder") and e.file_size < 100:
                    order = archive.read(e).decode("ascii", "replace")
                    if order != sys.byteorder:
                        raise CheckpointError(f"{what}: its byte order is {shown(order)}")
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        raise CheckpointError(
            f"{what}: is no file that torch.save of torch 1.6 or newer writes"
        ) from None


def _place_of(t: torch.Tensor, mapped: list[range], size: int, what: str) -> Region:
    if t.layout is not torch.strided or t.is_quantized or t.is_nested or t.device.type != "cpu":
        raise CheckpointError(f"{what}: is no dense tensor")
    if t.dtype not in DTYPES.values():
        raise CheckpointError(f"{what}: its dtype {t.dtype} is not known")
    if t.is_conj() or t.is_neg():
        raise CheckpointError(f"{what}: is a conjugate or negative view")
    shape, strides = tuple(t.shape), tuple(t.stride())
    if 0 in shape:
        return Region(0, 0, shape, t.dtype)
    address = t.data_ptr()
    offsets = [address - m.start for m in mapped if address in m]
    if not offsets or offsets[0] + _span(shape, strides) * t.element_size() > size:
        raise CheckpointError(f"{what}: does not lie in the file as torch.save writes it")
    return Region(0, offsets[0], shape, t.dtype, None if t.is_contiguous() else strides)


def _mapped(path: Path) -> list[range]:
    """Addresses at which a file is mapped from its first byte on; the kernel says it, not torch."""
    name = os.fsencode(path.resolve()).replace(b"\n", b"\\012")
    found = []
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            addresses, _, offset, _, _, *rest = line.rstrip(b"\n").split(maxsplit=5)
            if rest == [name] and int(offset, 16) == 0:
                begin, end = addresses.split(b"-")
                found.append(range(int(begin, 16), int(end, 16)))
    return found


def _overlapping(spans: list[tuple[int, int, str]]) -> set[str]:
    """The names of those that share bytes with another one."""
    found: set[str] = set()
    end, last = 0, ""
    for begin, stop, name in sorted(spans):
        if begin < end and stop > begin:
            found |= {name, last}
        if stop > end:
            end, last = stop, name
    return found
