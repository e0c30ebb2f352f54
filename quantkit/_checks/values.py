"""One argument at a time: what it must be, and the words of its error."""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Collection, Iterable
from typing import Any

import torch

from ..formats import (
    CODED_SCALES,
    FLOAT_DTYPES,
    FORMATS,
    OF_DTYPE,
    OF_NAME,
    OF_NUMBER,
    REAL_DTYPES,
    VERSION_1,
    Format,
)


def wrong(kind: type[Exception], name: str, expected: object, got: object) -> Exception:
    return kind(f"{name}: expected {expected}, got {got}")


def shown(value: object) -> str:
    """What was given, in an error: its type where it may have no text, or one of any length."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    if isinstance(value, str):
        return repr(value[:40])
    plain = isinstance(value, (int, float, torch.SymInt, torch.dtype))
    return str(value) if plain else type(value).__name__


def shown_sizes(value: object) -> str:
    """The same of what should be a list of ints."""
    return f"[{', '.join(map(shown, value))}]" if isinstance(value, (list, tuple)) else shown(value)


REAL = (REAL_DTYPES, "a real dtype of at least 16 bits if floating")
FLOATING = (FLOAT_DTYPES, "a floating dtype of at least 16 bits if floating")
SCALE = (
    (*FLOAT_DTYPES, *CODED_SCALES),
    f"a floating dtype of at least 16 bits, {' or '.join(map(str, CODED_SCALES))}",
)
MASK = ((torch.bool,), "torch.bool")


def tensor(
    name: str, value: object, kind: tuple[Collection[torch.dtype], str] | None = REAL
) -> None:
    """A dense tensor, of a kind of dtypes where there is one."""
    dense = "a dense (strided) tensor"
    if not isinstance(value, torch.Tensor):
        raise wrong(TypeError, name, "a torch.Tensor", type(value).__name__)
    if isinstance(value, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)):
        lazy = "the parameter of a lazy module that has not been called yet"
        raise wrong(TypeError, name, "a tensor with a shape", lazy)
    if value.is_nested:
        raise wrong(TypeError, name, dense, "a nested tensor")
    if value.layout is not torch.strided:
        raise wrong(TypeError, name, dense, f"layout {value.layout}")
    if kind is not None and value.dtype not in kind[0]:
        raise wrong(TypeError, name, kind[1], value.dtype)


def codes(name: str, value: object, f: Format) -> None:
    """A tensor in the dtype of a format's codes; float4_e2m1fn has two."""
    dtypes = dict.fromkeys((f.storage,) if f.has_zero_point else (f.storage, f.dtype))
    tensor(name, value, (dtypes, f"{one_of(dtypes)} for {f.name}"))


def one_of(names: Iterable[object]) -> str:
    *others, last = map(str, names)
    return f"{', '.join(others)} or {last}" if others else last


def format_given(dtype: object) -> Format:
    """The format of a dtype, or of a name, as functions take it."""
    return format_named(dtype, "dtype") if isinstance(dtype, str) else format_of(dtype)


def format_of(dtype: object) -> Format:
    """The format of a dtype, as QuantizationParams holds it."""
    found = OF_DTYPE.get(dtype) if isinstance(dtype, torch.dtype) else None
    if found is None:
        named = [OF_NAME[dtype]] if isinstance(dtype, str) and dtype in OF_NAME else FORMATS
        raise wrong(TypeError, "dtype", one_of(f.dtype for f in named), shown(dtype))
    return found


def format_named(name: str, argument: str = "format") -> Format:
    """The format of a name, as the ``.format`` operators take it."""
    if name not in OF_NAME:
        raise wrong(ValueError, argument, one_of(OF_NAME), shown(name))
    return OF_NAME[name]


def format_numbered(dtype: torch.dtype | int) -> Format:
    """The format of a dtype, or of torch's number of it, as version 1's operators take it."""
    found = OF_NUMBER.get(dtype) if isinstance(dtype, (torch.dtype, int)) else None
    if found is None:
        raise wrong(TypeError, "dtype", one_of(f.dtype for f in VERSION_1), shown(dtype))
    return found


def number(value: Any) -> Any:
    """A numpy number or bool as Python's; anything else as it is."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.generic):
        return value
    if isinstance(value, numpy.timedelta64):  # an integer by its class, and none to Python
        return value
    kinds = ((numpy.integer, operator.index), (numpy.floating, float), (numpy.bool_, bool))
    return next((convert(value) for kind, convert in kinds if isinstance(value, kind)), value)


def _taken(name: str, value: Any, kinds: tuple[type, ...], expected: str) -> Any:
    """value as one of kinds; what torch would turn into one without a word is an error."""
    if isinstance(value, kinds):
        return value
    plain = number(value)
    if not isinstance(plain, kinds):
        raise wrong(TypeError, name, expected, type(value).__name__)
    return plain


def integer(name: str, value: Any) -> Any:
    return _taken(name, value, (int, torch.SymInt), "an int")


def flag(name: str, value: Any) -> Any:
    return _taken(name, value, (int, torch.SymBool), "a bool")


def real(name: str, value: Any) -> Any:
    value = _taken(name, value, (int, float, torch.SymFloat), "a float")
    if isinstance(value, int):
        to_float(name, value)
    return value


def to_float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise wrong(ValueError, name, "a number that float64 holds", shown(value)) from None


def are_ints(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(
        isinstance(v, (int, torch.SymInt)) for v in values
    )


def block_sizes(block_size: Any, name: str = "block_size") -> Any:
    """A list or tuple of ints, or None."""
    if block_size is None or are_ints(block_size):
        return block_size
    if isinstance(block_size, (list, tuple)):
        block_size = list(map(number, block_size))
        if are_ints(block_size):
            return block_size
    raise wrong(TypeError, name, "a list of ints or None", shown_sizes(block_size))


def same(kind, name, what, got, expected, whose=""):
    if got != expected:
        raise wrong(kind, name, f"{what} {expected}{whose}", got)


def module(name: str, value: object) -> None:
    if not isinstance(value, torch.nn.Module):
        raise wrong(TypeError, name, "a torch.nn.Module", type(value).__name__)


def patterns(name: str, values: Any) -> list[str]:
    """Globs, and after ``re:`` regular expressions."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise wrong(TypeError, name, "a list of patterns", shown(values))
    values = list(values)
    for pattern in values:
        if not isinstance(pattern, str):
            raise wrong(TypeError, name, "a list of patterns", f"{shown(pattern)} among them")
        try:
            re.compile(pattern[3:] if pattern.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{name}: pattern {pattern!r}: {error}") from None
    return values
