"""Files of torch.save: an archive (zip) of a pickle and of the bytes of each storage.

torch.load says which tensors there are; their bytes are read from their places, tile by tile.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from .files import DTYPES, MAX_HEADER, CheckpointError, Region, check_name, shown, span_of


def read_archive(
    path: Path, size: int, index: int, name: str
) -> tuple[dict[str, Region], dict[str, str], set[str]]:
    """Places of the tensors that torch.load makes of a mapped file, which is not read for it.

    Returns:
        The tensors; what is none, each with a reason; names of tensors that share memory with another
        one: tied weights.

    Raises:
        CheckpointError for TorchScript, for pickles of more than weights, and for older files.
    """
    _check_archive(path, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch's loader raises what its unpickler meets
        text = str(error).strip() or type(error).__name__
        found = re.search(r"nsupported (?:global: )?GLOBAL (\S+)", text)
        reason = text.splitlines()[0]
        if found or isinstance(error, pickle.UnpicklingError):  # torch advises to trust the file
            reason = f"it asks for {found[1]}, which is no weight" if found else "a broken pickle"
        raise CheckpointError(f"{shown(name)}: {shown(reason)}") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise CheckpointError(f"{shown(name)}: expected a dict of tensors, got {kind}")
    tensors: dict[str, Region] = {}
    left_out: dict[str, str] = {}
    spans: list[tuple[int, int, str]] = []
    mapped = _mapped(path)
    for key, t in state.items():
        if not isinstance(key, str) or not isinstance(t, torch.Tensor):
            kind = f"no tensor, but {type(t).__name__}" if isinstance(key, str) else "no name"
            left_out[f"{name}: {key}"] = kind
            continue
        check_name(key, name)
        region = _place_of(t.detach(), mapped, size, f"{shown(name)}: {shown(key)}")
        tensors[key] = region._replace(file=index)
        span = span_of(region.shape, t.stride()) * t.element_size()
        spans.append((region.offset, region.offset + span, key))
    if not tensors:
        keys = ", ".join(map(repr, state)) or "none"
        raise CheckpointError(
            f"{shown(name)}: has no tensors: expected a dict of names and tensors, or one under "
            f"'state_dict', got the keys {shown(keys)}"
        )
    return tensors, left_out, _overlapping(spans)


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
    except CheckpointError:
        raise
    except Exception:  # zipfile raises what it meets
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
    if not offsets or offsets[0] + span_of(shape, strides) * t.element_size() > size:
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
