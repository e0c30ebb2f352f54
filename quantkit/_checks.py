"""Every refusal of the contract, once for Python: the reference, the fallback and the fake kernels.

``csrc/checks.h`` says the same in the same words for the compiled operators.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import _overlap, _torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REAL_DTYPES = (
    *FLOAT_DTYPES,
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
)
_LIMITS = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-32768, 32767)}
# torch's own numbers of the dtypes, which operators take as well: much cheaper to pass than a dtype.
NUMBER = {torch.uint8: 0, torch.int8: 1, torch.int16: 2}
_OF_NUMBER = {number: dtype for dtype, number in NUMBER.items()}


def shown(value: object) -> str:
    """What was given, in a refusal: its type where it may have no text, or one of any length."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    number = isinstance(value, (int, float, torch.SymInt, torch.dtype))
    return str(value) if number else type(value).__name__


def shown_sizes(value: object) -> str:
    """The same of what should be a list of ints."""
    return f"[{', '.join(map(shown, value))}]" if isinstance(value, (list, tuple)) else shown(value)


def tensor(name: str, value: object, dtypes: Sequence[torch.dtype] = REAL_DTYPES) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if isinstance(value, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)):
        raise TypeError(
            f"{name}: expected a tensor with a shape, got the parameter of a lazy module that has "
            "not been called yet"
        )
    if value.is_nested:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got a nested tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    if value.dtype not in dtypes:
        kinds = "a floating dtype" if dtypes is FLOAT_DTYPES else "a real dtype"
        raise TypeError(
            f"{name}: expected {kinds} of at least 16 bits if floating, got {value.dtype}"
        )


def limits(dtype: torch.dtype) -> tuple[int, int]:
    found = _LIMITS.get(dtype) if isinstance(dtype, torch.dtype) else None
    if found is None:
        raise TypeError(
            f"dtype: expected torch.int8, torch.uint8 or torch.int16, got {shown(dtype)}"
        )
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
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
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
        raise ValueError(
            f"{name}: expected a number that float64 holds, got {shown(value)}"
        ) from None


def q_range(q_min: int, q_max: int, dtype: torch.dtype | int = torch.int16) -> None:
    if isinstance(dtype, int):
        dtype = _OF_NUMBER[dtype]
    q_min, q_max = integer("q_min", q_min), integer("q_max", q_max)
    low, high = limits(dtype)
    if q_min > q_max:
        raise ValueError(
            f"q_min, q_max: expected q_min <= q_max, got {shown(q_min)} > {shown(q_max)}"
        )
    if q_min < low or q_max > high:
        raise ValueError(
            f"q_min, q_max: {shown_sizes([q_min, q_max])} is outside the limits "
            f"[{low}, {high}] of {dtype}"
        )


def smallest_dtype(q_min: int, q_max: int) -> torch.dtype:
    """The integer dtype of parameters that name none: int8 where the range fits, else uint8, int16."""
    q_range(q_min, q_max)
    return next(d for d, (low, high) in _LIMITS.items() if low <= q_min and q_max <= high)


def _fits(shape: Sequence[int], x_shape: Sequence[int]) -> bool:
    def divides(p: int, n: int) -> bool:
        if _surely(p == 1) or _surely(p == n):
            return True
        return not (_surely(n == 0) or _surely(p == 0) or _surely(n % p != 0))

    if len(shape) == len(x_shape):
        return all(divides(p, n) for p, n in zip(shape, x_shape, strict=True))
    inner = x_shape[len(x_shape) - len(shape) :]
    return len(shape) < len(x_shape) and all(
        not _surely((p != 1) & (p != n)) for p, n in zip(shape, inner, strict=True)
    )


def parameters(x_name: str, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
    """scale and zero_point against the tensor they belong to: kind, device, shape."""
    tensor(x_name, x)
    tensor("scale", scale, FLOAT_DTYPES)
    tensor("zero_point", zero_point)
    for name, p in (("scale", scale), ("zero_point", zero_point)):
        if p.device != x.device and not (p.dim() == 0 and p.device.type == "cpu"):
            raise RuntimeError(
                f"{name}: expected device {x.device}, that of {x_name}, got {p.device}"
            )
        if not _fits(p.shape, x.shape):
            raise ValueError(
                f"{name}: shape {tuple(p.shape)} does not fit {x_name} of shape {tuple(x.shape)}: "
                f"every size must divide {x_name}'s, or the shape broadcast to {x_name}'s"
            )
    if not _fits_each_other(scale.shape, zero_point.shape):
        raise ValueError(
            f"scale, zero_point: shapes {tuple(scale.shape)} and {tuple(zero_point.shape)} "
            "do not broadcast with each other"
        )


def _fits_each_other(a: Sequence[int], b: Sequence[int]) -> bool:
    pairs = zip(reversed(a), reversed(b), strict=False)
    return not any(_surely((m != n) & (m != 1) & (n != 1)) for m, n in pairs)


def block_sizes(block_size: Any) -> Any:
    """A list or tuple of ints, or None."""
    if block_size is None:
        return None
    if isinstance(block_size, (list, tuple)):
        if all(isinstance(b, (int, torch.SymInt)) for b in block_size):
            return block_size
        block_size = list(map(number, block_size))
        if all(isinstance(b, (int, torch.SymInt)) for b in block_size):
            return block_size
    raise TypeError(f"block_size: expected a list of ints or None, got {shown_sizes(block_size)}")


def choose_qparams(
    x: torch.Tensor,
    block_size: Sequence[int] | None,
    q_min: int,
    q_max: int,
    eps: float,
    symmetric: bool,
    include_zero: bool = False,
) -> None:
    tensor("x", x)
    q_range(q_min, q_max)
    if not eps > 0:
        raise ValueError(f"eps: expected a number above 0, got {float(eps)}")
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
        raise ValueError(
            f"x: expected at least one element to choose parameters from, "
            f"got an empty tensor of shape {tuple(x.shape)}"
        )


def dynamic_quantize(
    x: torch.Tensor,
    block_size: Sequence[int] | None,
    q_min: int,
    q_max: int,
    eps: float,
    symmetric: bool,
    dtype: torch.dtype,
    include_zero: bool = False,
) -> None:
    q_range(q_min, q_max, dtype)
    choose_qparams(x, block_size, q_min, q_max, eps, symmetric, include_zero)


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    q_min: int,
    q_max: int,
    dtype: torch.dtype = torch.int16,
) -> None:
    q_range(q_min, q_max, dtype)
    parameters("x", x, scale, zero_point)


def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
    parameters("q", q, scale, zero_point)


def blocks(block_size: Sequence[int], shape: Sequence[int]) -> None:
    if len(block_size) != len(shape):
        raise ValueError(
            f"block_size: expected {len(shape)} sizes, one per dimension of x "
            f"of shape {tuple(shape)}, got {shown_sizes(block_size)}"
        )
    for dim, (b, n) in enumerate(zip(block_size, shape, strict=True)):
        if b == 0 or b < -1:
            raise ValueError(
                "block_size: expected sizes of at least 1, or -1 for a whole dimension, "
                f"got {shown_sizes(block_size)}"
            )
        if b != -1 and _surely(n % b != 0):
            raise ValueError(
                f"block_size: {shown(b)} does not divide {n}, the size of dimension {dim} of x"
            )


def fake_quantize_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    q_min: int,
    q_max: int,
) -> None:
    quantize(x, scale, zero_point, q_min, q_max)
    tensor("grad", grad, FLOAT_DTYPES)
    if grad.dtype != x.dtype:
        raise TypeError(f"grad: expected dtype {x.dtype}, that of x, got {grad.dtype}")
    if tuple(grad.shape) != tuple(x.shape):
        raise ValueError(f"grad: expected shape {tuple(x.shape)}, got {tuple(grad.shape)}")
    if grad.device != x.device:
        raise RuntimeError(f"grad: expected device {x.device}, that of x, got {grad.device}")


def outputs(
    outs: dict[str, torch.Tensor],
    like: Sequence[tuple[Sequence[int], torch.dtype, torch.device]],
    inputs: dict[str, torch.Tensor],
    in_place: str | None = None,
) -> None:
    """``out=`` tensors: shape, dtype and device of the result, no memory in common with anything.

    in_place names an input that an output may be, element on element.
    """
    for (name, out), (shape, dtype, device) in zip(outs.items(), like, strict=True):
        tensor(name, out)
        if out.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype}, got {out.dtype}")
        if out.device != device:
            raise ValueError(f"{name}: expected device {device}, got {out.device}")
        if tuple(out.shape) != tuple(shape):
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(out.shape)}")
    if any(
        t.device.type == "meta" or _torch.is_fake(t) for t in (*outs.values(), *inputs.values())
    ):
        return
    for name, out in outs.items():
        if _overlap.with_itself(out):
            raise ValueError(f"{name}: its elements overlap each other in memory")
    names = list(outs)
    for i, name in enumerate(names):
        others = inputs | {other: outs[other] for other in names[:i]}
        for other, t in others.items():
            if other == in_place and _same_elements(outs[name], t):
                continue
            if _overlap.between(outs[name], t):
                raise ValueError(f"{name}: overlaps {other} in memory")


def outside_of_graphs(outs: dict[str, torch.Tensor]) -> None:
    """An output that autograd made has a history, which writing would not change."""
    for name, out in outs.items():
        if torch.is_grad_enabled() and not out.is_leaf:
            raise RuntimeError(
                f"{name}: expected a tensor outside of autograd's graphs, as out= has no gradient; "
                f"pass {name}.detach()"
            )


def claim(outs: dict[str, torch.Tensor]) -> None:
    """Tell autograd that ``out=`` tensors will be written; it refuses some."""
    for name, out in outs.items():
        try:
            out.copy_(out)  # stays as it is, but counts as a new version
        except RuntimeError as error:
            raise RuntimeError(f"{name}: cannot be written: {error}") from None


def _surely(condition: bool | torch.SymBool) -> bool:
    """A condition on sizes; False where a compiler cannot know it."""
    if not isinstance(condition, torch.SymBool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # heavy

    return guard_or_false(condition)


def _same_elements(a: torch.Tensor, b: torch.Tensor) -> bool:
    dims = zip(a.shape, a.stride(), b.stride(), strict=True)
    strides = all(n == 1 or s == t for n, s, t in dims)  # those of size 1 lead nowhere
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and strides
