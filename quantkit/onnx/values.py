"""What the exporter knows of a value: its sizes and its dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..formats import OF_NAME, Format

Value = Any  # a value of the graph, with shape and dtype where the exporter knows them


def unsupported(what: str, value: object) -> Exception:
    return ValueError(f"quantkit.onnx cannot write {what} {value}: docs/onnx.md has what it can")


def sizes_of(v: Value) -> list[int | None]:
    """Sizes that are fixed, and None for others."""
    return [n if isinstance(n, int) else None for n in v.shape]


# ONNX's numbers of dtypes: TensorProto.DataType.
NUMBERS = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.uint16: 4, torch.int16: 5, torch.int32: 6,
    torch.int64: 7, torch.bool: 9, torch.float16: 10, torch.float64: 11, torch.uint32: 12,
    torch.uint64: 13, torch.bfloat16: 16, torch.float8_e4m3fn: 17, torch.float8_e5m2: 19,
}  # fmt: skip
DTYPES = {number: dtype for dtype, number in NUMBERS.items()}


def dtype_of(v: Value) -> Any:
    """Of a value that the exporter knows; None of one that is made here."""
    return None if v is None or v.dtype is None else DTYPES.get(int(v.dtype), v.dtype)


def shaped(v: Value, sizes: Sequence[Any], like: Value) -> Value:
    """v, of which these sizes are known."""
    v.shape = type(like.shape)([n if isinstance(n, int) else None for n in sizes])
    return v


def of_number(number: int) -> Format:
    """The format of version 1 with this dtype."""
    return next(
        f for f in OF_NAME.values() if f.number is not None and NUMBERS[f.dtype] == int(number)
    )
