"""Every error of the contract, once for Python: the reference, the fallback and the fake kernels.

``csrc/checks.h`` says the same in the same words for the compiled operators.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import _overlap, _torch
from .formats import FLOAT_DTYPES, FORMATS, OF_DTYPE, REAL_DTYPES, WIDEST, Format

# ---- words --------------------------------------------------------------------------------------------


def wrong(kind: type[Exception], name: str, expected: object, got: object) -> Exception:
    return kind(f"{name}: expected {expected}, got {got}")


def shown(value: object) -> str:
    """What was given, in an error: its type where it may have no text, or one of any length."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    number = isinstance(value, (int, float, torch.SymInt, torch.dtype))
    return str(value) if number else type(value).__name__


def shown_sizes(value: object) -> str:
    """The same of what should be a list of ints."""
    return f"[{', '.join(map(shown, value))}]" if isinstance(value, (list, tuple)) else shown(value)


# ---- one argument -------------------------------------------------------------------------------------


REAL = (REAL_DTYPES, "a real dtype of at least 16 bits if floating")
FLOATING = (FLOAT_DTYPES, "a floating dtype of at least 16 bits if floating")
MASK = ((torch.bool,), "torch.bool")


def tensor(name: str, value: object, kind: tuple[Sequence[torch.dtype], str] = REAL) -> None:
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
    dtypes, expected = kind
    if value.dtype not in dtypes:
        raise wrong(TypeError, name, expected, value.dtype)


def format_of(dtype: object, numbered: bool = False) -> Format:
    """The format of dtype, which operators take by torch's number too."""
    found = None
    if isinstance(dtype, torch.dtype) or (numbered and isinstance(dtype, int)):
        found = OF_DTYPE.get(dtype)
    if found is None:
        *names, last = (str(f.dtype) for f in FORMATS)
        raise wrong(TypeError, "dtype", f"{', '.join(names)} or {last}", shown(dtype))
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


def _are_ints(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(
        isinstance(v, (int, torch.SymInt)) for v in values
    )


def block_sizes(block_size: Any) -> Any:
    """A list or tuple of ints, or None."""
    if block_size is None or _are_ints(block_size):
        return block_size
    if isinstance(block_size, (list, tuple)):
        block_size = list(map(number, block_size))
        if _are_ints(block_size):
            return block_size
    raise wrong(TypeError, "block_size", "a list of ints or None", shown_sizes(block_size))


# ---- arguments together -------------------------------------------------------------------------------


def q_range(q_min: int, q_max: int, dtype: torch.dtype | int = WIDEST.dtype) -> None:
    q_min, q_max = integer("q_min", q_min), integer("q_max", q_max)
    f = format_of(dtype, numbered=True)
    if q_min > q_max:
        raise wrong(
            ValueError, "q_min, q_max", "q_min <= q_max", f"{shown(q_min)} > {shown(q_max)}"
        )
    if q_min < f.low or q_max > f.high:
        raise ValueError(
            f"q_min, q_max: {shown_sizes([q_min, q_max])} is outside the limits "
            f"[{f.low}, {f.high}] of {f.dtype}"
        )


def smallest_format(q_min: int, q_max: int) -> Format:
    """Of parameters that name no dtype: the first that holds the limits."""
    q_range(q_min, q_max)
    return next(f for f in FORMATS if f.low <= q_min and q_max <= f.high)


def _surely(condition: bool | torch.SymBool) -> bool:
    """A condition on sizes; False where a compiler cannot know it."""
    if not isinstance(condition, torch.SymBool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # heavy

    return guard_or_false(condition)


def _divides(p: int, n: int) -> bool:
    if _surely(p == 1) or _surely(p == n):
        return True
    return not (_surely(n == 0) or _surely(p == 0) or _surely(n % p != 0))


def _broadcast(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes broadcast with each other."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return not any(_surely((m != n) & (m != 1) & (n != 1)) for m, n in pairs)


def _fits(shape: Sequence[int], x_shape: Sequence[int]) -> bool:
    if len(shape) == len(x_shape):
        return all(map(_divides, shape, x_shape))
    pairs = zip(reversed(shape), reversed(x_shape), strict=False)
    return len(shape) < len(x_shape) and not any(_surely((p != 1) & (p != n)) for p, n in pairs)


def parameters(x_name: str, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
    """scale and zero_point against the tensor they belong to: kind, device, shape."""
    tensor(x_name, x)
    tensor("scale", scale, FLOATING)
    tensor("zero_point", zero_point)
    for name, p in (("scale", scale), ("zero_point", zero_point)):
        if p.device != x.device and not (p.dim() == 0 and p.device.type == "cpu"):
            raise wrong(RuntimeError, name, f"device {x.device}, that of {x_name}", p.device)
        if not _fits(p.shape, x.shape):
            raise ValueError(
                f"{name}: shape {tuple(p.shape)} does not fit {x_name} of shape {tuple(x.shape)}: "
                f"every size must divide {x_name}'s, or the shape broadcast to {x_name}'s"
            )
    if not _broadcast(scale.shape, zero_point.shape):
        raise ValueError(
            f"scale, zero_point: shapes {tuple(scale.shape)} and {tuple(zero_point.shape)} "
            "do not broadcast with each other"
        )


def blocks(block_size: Sequence[int], shape: Sequence[int]) -> None:
    if len(block_size) != len(shape):
        sizes = f"{len(shape)} sizes, one per dimension of x of shape {tuple(shape)}"
        raise wrong(ValueError, "block_size", sizes, shown_sizes(block_size))
    for dim, (b, n) in enumerate(zip(block_size, shape, strict=True)):
        if b == 0 or b < -1:
            sizes = "sizes of at least 1, or -1 for a whole dimension"
            raise wrong(ValueError, "block_size", sizes, shown_sizes(block_size))
        if b != -1 and _surely(n % b != 0):
            raise ValueError(
                f"block_size: {shown(b)} does not divide {n}, the size of dimension {dim} of x"
            )


def _same(kind, name, what, got, expected, whose=""):
    if got != expected:
        raise wrong(kind, name, f"{what} {expected}{whose}", got)


# ---- the operators, with their arguments --------------------------------------------------------------


def choose_qparams(x, block_size, q_min, q_max, eps, symmetric, include_zero=False):
    tensor("x", x)
    q_range(q_min, q_max)
    if not eps > 0:
        raise wrong(ValueError, "eps", "a number above 0", float(eps))
    symmetric, include_zero = flag("symmetric (sym)", symmetric), flag("include_zero", include_zero)
    if include_zero and symmetric:
        raise ValueError(
            "include_zero: only the asymmetric scheme takes it, but the symmetric one was asked for"
        )
    if block_size is not None:
        blocks(block_size, x.shape)
    # Without a block there is nothing to choose; a block without elements has no extremes.
    pairs = zip(x.shape, block_size or (), strict=False)
    blockless = any(_surely(n == 0) and b != -1 for n, b in pairs)
    if _surely(x.numel() == 0) and not blockless:
        empty = f"an empty tensor of shape {tuple(x.shape)}"
        raise wrong(ValueError, "x", "at least one element to choose parameters from", empty)


def dynamic_quantize(x, block_size, q_min, q_max, eps, symmetric, dtype, include_zero=False):
    q_range(q_min, q_max, dtype)
    choose_qparams(x, block_size, q_min, q_max, eps, symmetric, include_zero)


def quantize(x, scale, zero_point, q_min, q_max, dtype=WIDEST.dtype):
    q_range(q_min, q_max, dtype)
    parameters("x", x, scale, zero_point)


def dequantize(q, scale, zero_point):
    parameters("q", q, scale, zero_point)


def fake_quantize_backward(grad, x, scale, zero_point, q_min, q_max):
    quantize(x, scale, zero_point, q_min, q_max)
    tensor("grad", grad, FLOATING)
    _same(TypeError, "grad", "dtype", grad.dtype, x.dtype, ", that of x")
    _same(ValueError, "grad", "shape", tuple(grad.shape), tuple(x.shape))
    _same(RuntimeError, "grad", "device", grad.device, x.device, ", that of x")


def masked_gradient(grad, mask):
    tensor("grad", grad, FLOATING)
    tensor("mask", mask, MASK)
    _same(ValueError, "grad", "shape", tuple(grad.shape), tuple(mask.shape), ", that of mask")
    _same(RuntimeError, "grad", "device", grad.device, mask.device, ", that of mask")


# ---- out= ---------------------------------------------------------------------------------------------

_Tensors = dict[str, torch.Tensor]


def _same_elements(a: torch.Tensor, b: torch.Tensor) -> bool:
    dims = zip(a.shape, a.stride(), b.stride(), strict=True)
    strides = all(n == 1 or s == t for n, s, t in dims)  # those of size 1 lead nowhere
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and strides


def outputs(
    outs: _Tensors, results: Sequence[torch.Tensor], inputs: _Tensors, in_place: str | None
) -> None:
    """``out=`` tensors: shape, dtype and device of the result, no memory in common with anything.

    in_place names an input that an output may be, element on element.
    """
    for (name, out), result in zip(outs.items(), results, strict=True):
        tensor(name, out)
        _same(TypeError, name, "dtype", out.dtype, result.dtype)
        _same(ValueError, name, "device", out.device, result.device)
        _same(ValueError, name, "shape", tuple(out.shape), tuple(result.shape))
    every = (*outs.values(), *inputs.values())
    if not any(t.device.type == "meta" or _torch.is_fake(t) for t in every):
        _overlaps(outs, inputs, in_place)
    for name, out in outs.items():
        if (
            torch.is_grad_enabled() and not out.is_leaf
        ):  # its history would not be that of its values
            raise RuntimeError(
                f"{name}: expected a tensor outside of autograd's graphs, as out= has no gradient; "
                f"pass {name}.detach()"
            )


def _overlaps(outs: _Tensors, inputs: _Tensors, in_place: str | None) -> None:
    for name, out in outs.items():
        if _overlap.with_itself(out):
            raise ValueError(f"{name}: its elements overlap each other in memory")
    others = dict(inputs)
    for name, out in outs.items():
        for other, t in others.items():
            allowed = other == in_place and _same_elements(out, t)
            if not allowed and _overlap.between(out, t):
                raise ValueError(f"{name}: overlaps {other} in memory")
        others[name] = out


def claim(outs: _Tensors) -> None:
    """Tell autograd that ``out=`` tensors will be written; it refuses some."""
    for name, out in outs.items():
        try:
            out.copy_(out)  # stays as it is, but counts as a new version
        except RuntimeError as error:
            raise RuntimeError(f"{name}: cannot be written: {error}") from None
