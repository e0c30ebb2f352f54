"""Every error of the contract, once for Python: the reference, the fallback and the fake kernels.

``csrc/checks.h`` says the same in the same words for the compiled operators.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from . import _overlap, _torch
from .formats import (
    CODED_SCALES,
    E4M3,
    E8M0,
    FLOAT_DTYPES,
    FORMATS,
    OF_DTYPE,
    OF_NAME,
    OF_NUMBER,
    REAL_DTYPES,
    VERSION_1,
    WIDEST,
    Format,
)
from .schemes import POWERS, RULES

# ---- words --------------------------------------------------------------------------------------------


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


# ---- one argument -------------------------------------------------------------------------------------


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
    tensor(name, value, (dtypes, f"{_one_of(dtypes)} for {f.name}"))


def _one_of(names: Iterable[object]) -> str:
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
        raise wrong(TypeError, "dtype", _one_of(f.dtype for f in named), shown(dtype))
    return found


def format_named(name: str, argument: str = "format") -> Format:
    """The format of a name, as the ``.format`` operators take it."""
    if name not in OF_NAME:
        raise wrong(ValueError, argument, _one_of(OF_NAME), shown(name))
    return OF_NAME[name]


def format_numbered(dtype: torch.dtype | int) -> Format:
    """The format of a dtype, or of torch's number of it, as version 1's operators take it."""
    found = OF_NUMBER.get(dtype) if isinstance(dtype, (torch.dtype, int)) else None
    if found is None:
        raise wrong(TypeError, "dtype", _one_of(f.dtype for f in VERSION_1), shown(dtype))
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


def block_sizes(block_size: Any, name: str = "block_size") -> Any:
    """A list or tuple of ints, or None."""
    if block_size is None or _are_ints(block_size):
        return block_size
    if isinstance(block_size, (list, tuple)):
        block_size = list(map(number, block_size))
        if _are_ints(block_size):
            return block_size
    raise wrong(TypeError, name, "a list of ints or None", shown_sizes(block_size))


# ---- arguments together -------------------------------------------------------------------------------


def keywords(name: str, given: Iterable[object], valid: Sequence[str]) -> None:
    """The keys of a scheme, or of what overrides it."""
    for key in given:
        if key not in valid:
            raise wrong(TypeError, name, f"keys among {', '.join(valid)}", shown(key))


def one_granularity(
    scheme: object, options: Collection[str], block_size: Sequence[int], per_channel: Any
) -> None:
    """Of block_size and per_channel=True one must not be the scheme's and the other an option."""
    given = [name for name in ("block_size", "per_channel") if name in options]
    if len(given) != 1 or not flag("per_channel", per_channel):
        return
    whose = f"scheme {scheme}" if isinstance(scheme, str) else "the scheme"
    if given == ["per_channel"]:
        its, without = f"block_size {shown_sizes(list(block_size))}", "block_size=None"
    else:
        its, without = "per_channel=True", "per_channel=False"
    raise ValueError(f"{given[0]}: {whose} has {its}; pass {without} as well to replace that")


def q_range(q_min: int, q_max: int, f: Format = WIDEST, name: object = None) -> None:
    """The limits of codes against their format, whose name in the error is its dtype."""
    q_min, q_max = integer("q_min", q_min), integer("q_max", q_max)
    if f.holds(q_min, q_max):
        return
    if not f.has_zero_point:
        expected = (
            f"-n and n, n a positive integer that is a number of {name or f.dtype} up to {f.high}"
        )
        raise wrong(ValueError, "q_min, q_max", expected, shown_sizes([q_min, q_max]))
    if q_min > q_max:
        raise wrong(
            ValueError, "q_min, q_max", "q_min <= q_max", f"{shown(q_min)} > {shown(q_max)}"
        )
    raise ValueError(
        f"q_min, q_max: {shown_sizes([q_min, q_max])} is outside the limits "
        f"[{f.low}, {f.high}] of {name or f.dtype}"
    )


_INTEGERS = tuple(f for f in FORMATS if f.has_zero_point)


def smallest_format(q_min: int, q_max: int) -> Format:
    """Of parameters that name no dtype: the first of version 1's that holds the limits."""
    q_min, q_max = integer("q_min", q_min), integer("q_max", q_max)
    f = next((f for f in _INTEGERS if f.holds(q_min, q_max)), WIDEST)
    if f is WIDEST:
        q_range(q_min, q_max)
    if f.number is None:
        limits = shown_sizes([q_min, q_max])
        raise wrong(ValueError, "dtype", f"{f.dtype} for q_min, q_max of {limits}", None)
    return f


def _may_be_symbolic(value: object) -> bool:
    """Whether value is a compiler's symbol; dynamo shows a function those as plain numbers."""
    return isinstance(value, (torch.SymBool, torch.SymInt)) or torch.compiler.is_compiling()


def is_symbol(size: int) -> bool:
    """Whether a size is a compiler's symbol, which may have many values."""
    if not _may_be_symbolic(size):
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # heavy

    return not has_static_value(size)


def _surely(condition: bool | torch.SymBool) -> bool:
    """A condition on sizes; False where a compiler cannot know it."""
    if not _may_be_symbolic(condition):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # heavy

    return guard_or_false(condition)


def known(condition: bool | torch.SymBool) -> bool:
    """A condition on sizes; False where only its values, and not its symbols, make it true."""
    if not _may_be_symbolic(condition):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # heavy

    return statically_known_true(condition)


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


def _on_the_device(name: str, p: torch.Tensor, x_name: str, x: torch.Tensor) -> None:
    if p.device != x.device and not (p.dim() == 0 and p.device.type == "cpu"):
        raise wrong(RuntimeError, name, f"device {x.device}, that of {x_name}", p.device)


def _fits_shape(name: str, p: torch.Tensor, x_name: str, shape: Sequence[int]) -> None:
    if not _fits(p.shape, shape):
        raise ValueError(
            f"{name}: shape {tuple(p.shape)} does not fit {x_name} of shape {tuple(shape)}: "
            f"every size must divide {x_name}'s, or the shape broadcast to {x_name}'s"
        )


def _fit_each_other(scale: torch.Tensor, zero_point: torch.Tensor) -> None:
    if not _broadcast(scale.shape, zero_point.shape):
        raise ValueError(
            f"scale, zero_point: shapes {tuple(scale.shape)} and {tuple(zero_point.shape)} "
            "do not broadcast with each other"
        )


def parameters(x_name: str, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
    """scale and zero_point against the tensor they belong to: kind, device, shape."""
    tensor(x_name, x)
    tensor("scale", scale, FLOATING)
    tensor("zero_point", zero_point)
    for name, p in (("scale", scale), ("zero_point", zero_point)):
        _on_the_device(name, p, x_name, x)
        _fits_shape(name, p, x_name, x.shape)
    _fit_each_other(scale, zero_point)


def format_parameters(
    x_name: str, x: torch.Tensor, shape: Sequence[int], f: Format, scale: torch.Tensor,
    zero_point: torch.Tensor | None, block_size: Sequence[int] | None,
    global_scale: torch.Tensor | None,
) -> None:  # fmt: skip
    """The same of a ``.format`` operator, by the shape of the elements that x, or q, stands for."""
    tensor("scale", scale, SCALE)
    given = {"scale": scale}
    if zero_point is not None:
        if not f.has_zero_point:
            raise wrong(ValueError, "zero_point", f"None for {f.name}", type(zero_point).__name__)
        tensor("zero_point", zero_point)
        given["zero_point"] = zero_point
    for name, p in given.items():
        _on_the_device(name, p, x_name, x)
    if block_size is not None:
        blocks(block_size, shape, x_name, short=True)
        block_parameter("scale", scale, shape, block_size, x_name)
    else:
        _fits_shape("scale", scale, x_name, shape)
    if global_scale is not None:
        if scale.dtype == E8M0:
            raise ValueError(f"global_scale: {E8M0} scales take none")
        global_parameter(global_scale, x_name, x, scale.shape)
    if zero_point is None or (block_size is not None and _fits_scale(scale, zero_point)):
        return
    if block_size is not None and has_short_block(shape, block_size):
        expected = f"sizes of 1 or those of scale of shape {tuple(scale.shape)} beside short blocks"
        raise wrong(ValueError, "zero_point", expected, tuple(zero_point.shape))
    _fits_shape("zero_point", zero_point, x_name, shape)
    _fit_each_other(scale, zero_point)


def global_parameter(
    global_scale: torch.Tensor, x_name: str, x: torch.Tensor, scale_shape: Sequence[int]
) -> None:
    """A scale of scales: 0-dim, or of scale's rank with sizes that divide scale's."""
    tensor("global_scale", global_scale, FLOATING)
    _on_the_device("global_scale", global_scale, x_name, x)
    rank = global_scale.dim()
    if rank not in (0, len(scale_shape)) or not _fits(global_scale.shape, scale_shape):
        raise ValueError(
            f"global_scale: shape {tuple(global_scale.shape)} does not fit scale of shape "
            f"{tuple(scale_shape)}: expected no dimension, or sizes that divide scale's"
        )


def _fits_scale(scale: torch.Tensor, zero_point: torch.Tensor) -> bool:
    """Whether each size is 1 or scale's; also without dimensions."""
    if zero_point.dim() not in (0, scale.dim()):
        return False
    pairs = zip(zero_point.shape, scale.shape, strict=False)
    return not any(_surely((z != 1) & (z != s)) for z, s in pairs)


def blocks_in(n: int, block: int) -> int:
    """How many blocks a dimension has; the last one may be short."""
    # Of a symbol that is x's own size there is one, which the sum does not say.
    return 1 if block == -1 or known(n == block) else (n + block - 1) // block


def has_short_block(shape: Sequence[int], block_size: Sequence[int]) -> bool:
    return any(b != -1 and _surely(n % b != 0) for n, b in zip(shape, block_size, strict=True))


def block_parameter(
    name: str, p: torch.Tensor, shape: Sequence[int], block_size: Sequence[int], x_name: str = "x"
) -> None:
    """A parameter of x's rank: one for each block."""
    expected = [blocks_in(n, b) for n, b in zip(shape, block_size, strict=True)]
    if p.dim() != len(expected) or any(
        _surely(a != b) for a, b in zip(p.shape, expected, strict=True)
    ):
        raise ValueError(
            f"{name}: shape {tuple(p.shape)} does not fit {x_name} of shape {tuple(shape)} and "
            f"block_size {shown_sizes(list(block_size))}: expected {tuple(expected)}"
        )


def blocks(
    block_size: Sequence[int], shape: Sequence[int], x_name: str = "x", short: bool = False,
    name: str = "block_size",
) -> None:  # fmt: skip
    if len(block_size) != len(shape):
        sizes = f"{len(shape)} sizes, one per dimension of {x_name} of shape {tuple(shape)}"
        raise wrong(ValueError, name, sizes, shown_sizes(block_size))
    for dim, (b, n) in enumerate(zip(block_size, shape, strict=True)):
        if _surely(b == 0) or _surely(b < -1) or (isinstance(b, int) and b >= 2**63):
            sizes = "sizes of at least 1, or -1 for a whole dimension"
            raise wrong(ValueError, name, sizes, shown_sizes(block_size))
        if not short and b != -1 and _surely(n % b != 0):
            raise ValueError(
                f"block_size: {shown(b)} does not divide {n}, the size of dimension {dim} of {x_name}; "
                "a short last block needs compute_dtype=torch.float32"
            )


def _same(kind, name, what, got, expected, whose=""):
    if got != expected:
        raise wrong(kind, name, f"{what} {expected}{whose}", got)


# ---- the operators, with their arguments --------------------------------------------------------------


def _choice(x, block_size, eps, symmetric, include_zero, short):
    if not eps > 0:
        raise wrong(ValueError, "eps", "a number above 0", float(eps))
    symmetric, include_zero = flag("symmetric (sym)", symmetric), flag("include_zero", include_zero)
    if include_zero and symmetric:
        raise ValueError(
            "include_zero: only the asymmetric scheme takes it, but the symmetric one was asked for"
        )
    _chosen_blocks(x, block_size, short)


def _chosen_blocks(x, block_size, short):
    if block_size is not None:
        blocks(block_size, x.shape, short=short)
    # Without a block there is nothing to choose; a block without elements has no extremes.
    pairs = zip(x.shape, block_size or (), strict=False)
    blockless = any(_surely(n == 0) and b != -1 for n, b in pairs)
    if _surely(x.numel() == 0) and not blockless:
        empty = f"an empty tensor of shape {tuple(x.shape)}"
        raise wrong(ValueError, "x", "at least one element to choose parameters from", empty)


def choose_qparams(x, block_size, q_min, q_max, eps, symmetric, include_zero=False):
    tensor("x", x)
    q_range(q_min, q_max)
    _choice(x, block_size, eps, symmetric, include_zero, short=False)


def aminmax(x, block_size):
    tensor("x", x)
    _chosen_blocks(x, block_size, short=True)


def dynamic_quantize(x, block_size, q_min, q_max, eps, symmetric, dtype, include_zero=False):
    q_range(q_min, q_max, format_numbered(dtype))
    choose_qparams(x, block_size, q_min, q_max, eps, symmetric, include_zero)


def quantize(x, scale, zero_point, q_min, q_max, dtype=WIDEST.dtype):
    q_range(q_min, q_max, format_numbered(dtype))
    parameters("x", x, scale, zero_point)


def dequantize(q, scale, zero_point):
    parameters("q", q, scale, zero_point)


def fake_quantize_backward(grad, x, scale, zero_point, q_min, q_max):
    quantize(x, scale, zero_point, q_min, q_max)
    tensor("grad", grad, FLOATING)
    _same(TypeError, "grad", "dtype", grad.dtype, x.dtype, ", that of x")
    _same(ValueError, "grad", "shape", tuple(grad.shape), tuple(x.shape))
    _same(RuntimeError, "grad", "device", grad.device, x.device, ", that of x")


def parameter_gradient(grad, x, scale, zero_point, q_min, q_max, *format, **options):
    if format:
        fake_quantize_format(x, scale, zero_point, q_min, q_max, *format, **options)
    else:
        quantize(x, scale, zero_point, q_min, q_max)
    tensor("grad", grad, FLOATING)
    _same(ValueError, "grad", "shape", tuple(grad.shape), tuple(x.shape), ", that of x")
    _same(RuntimeError, "grad", "device", grad.device, x.device, ", that of x")


def learnable(scale, global_scale):
    """Whose gradients there are."""
    if global_scale is not None:
        for name, t in (("global_scale", global_scale), ("scale", scale)):
            if t.requires_grad:
                beside = "" if name == "global_scale" else " beside a global_scale"
                raise ValueError(
                    f"{name}: requires grad, but gets none{beside}; pass a detached one"
                )
    if scale.requires_grad and scale.dtype not in FLOATING[0]:
        raise ValueError(f"scale: {scale.dtype} requires grad, but gets none; pass a detached one")


INT8 = ((torch.int8,), "torch.int8")
FLOAT32 = ((torch.float32,), "torch.float32")
MOST_COLUMNS = 131_071  # so many products of int8 fit into 32 bits


def linear_w8a8(x, q, scale, bias=None):
    tensor("x", x, FLOATING)
    tensor("q", q, INT8)
    tensor("scale", scale, FLOAT32)
    if bias is not None:
        tensor("bias", bias, FLOATING)
    shape = tuple(x.shape)
    if not shape or _surely(x.shape[-1] == 0) or _surely(x.shape[-1] > MOST_COLUMNS):
        sizes = f"a last dimension of 1 to {MOST_COLUMNS} elements"
        raise wrong(ValueError, "x", sizes, f"shape {shape}")
    columns = x.shape[-1]
    if q.dim() != 2 or _surely(q.shape[1] != columns):
        expected = f"shape (outputs, {columns}), as x has shape {shape}"
        raise wrong(ValueError, "q", expected, tuple(q.shape))
    outputs = q.shape[0]
    each = scale.dim() == 2 and not _surely((scale.shape[0] != outputs) | (scale.shape[1] != 1))
    if scale.dim() != 0 and not each:
        expected = f"shape () or ({outputs}, 1)"
        raise wrong(ValueError, "scale", expected, tuple(scale.shape))
    if bias is not None and (bias.dim() != 1 or _surely(bias.shape[0] != outputs)):
        raise wrong(ValueError, "bias", f"shape ({outputs},)", tuple(bias.shape))
    for name, t in (("q", q), ("scale", scale), ("bias", bias)):
        if t is not None:
            _on_the_device(name, t, "x", x)


def masked_gradient(grad, mask):
    tensor("grad", grad, FLOATING)
    tensor("mask", mask, MASK)
    _same(ValueError, "grad", "shape", tuple(grad.shape), tuple(mask.shape), ", that of mask")
    _same(RuntimeError, "grad", "device", grad.device, mask.device, ", that of mask")


# ---- the .format operators, with their arguments ------------------------------------------------------


def scale_choice(f, symmetric, eps, scale_dtype, scale_rule, global_scale):
    """What there is of scales for a format."""
    if not any(scale_dtype is d for d in (None, torch.float32, *CODED_SCALES)):
        dtypes = _one_of((None, torch.float32, *CODED_SCALES))
        raise wrong(TypeError, "scale_dtype", dtypes, shown(scale_dtype))
    if scale_rule is not None:
        if not isinstance(scale_rule, str):
            raise wrong(TypeError, "scale_rule", "a str or None", type(scale_rule).__name__)
        if scale_rule not in RULES:
            raise wrong(ValueError, "scale_rule", _one_of((None, *RULES)), shown(scale_rule))
        if scale_rule == "half_range" and (f.low >= 0 or not f.has_zero_point):
            raise ValueError(f"scale_rule: half_range is for signed integer formats, got {f.name}")
        if scale_rule == "even" and f.has_zero_point:
            raise ValueError(f"scale_rule: even is for float formats, got {f.name}")
        made = {E8M0: POWERS, E4M3.dtype: ()}.get(scale_dtype, RULES)
        if scale_rule not in made:
            raise ValueError(f"scale_rule: {scale_rule} makes no scales of {scale_dtype}")
    if global_scale is not None and (scale_dtype is E8M0 or scale_rule in POWERS):
        raise ValueError("global_scale: scales that are powers of two take none")
    # Of what float32 rounds to it or less, e4m3 makes 0.
    if scale_dtype is E4M3.dtype and not eps > 2.0**-10 + 2.0**-34:
        raise wrong(ValueError, "eps", f"a number above 2**-10 for {scale_dtype}", float(eps))
    if not flag("symmetric (sym)", symmetric):
        if not f.has_zero_point:
            raise wrong(ValueError, "symmetric (sym)", f"True for {f.name}", shown(symmetric))
        for name, value in (
            ("scale_rule", scale_rule),
            ("scale_dtype", scale_dtype if scale_dtype in CODED_SCALES else None),
            ("global_scale", global_scale),
        ):
            if value is not None:
                raise ValueError(
                    f"{name}: only the symmetric scheme takes one, but the asymmetric one was asked for"
                )


def compute_dtype(value):
    if value is not None and value is not torch.float32:
        raise wrong(TypeError, "compute_dtype", "None or torch.float32", shown(value))


def rounding(f, round_first, seed=None):
    if not flag("round_first", round_first):
        return
    if not f.has_zero_point:
        raise wrong(ValueError, "round_first", f"False for {f.name}", shown(round_first))
    if seed is not None:
        raise wrong(ValueError, "round_first", "False with seed", shown(round_first))


def seed_pair(seed: Any) -> tuple[int, int]:
    """(seed, stream) of an int, whose stream is 0, or of a pair."""
    pair = seed if isinstance(seed, (list, tuple)) else (seed, 0)
    if len(pair) != 2 or not _are_ints(list(map(number, pair))):
        found = shown_sizes(list(seed)) if isinstance(seed, (list, tuple)) else shown(seed)
        raise wrong(TypeError, "seed", "an int, a pair of ints or a torch.Tensor", found)
    low, high = (int(number(value)) for value in pair)
    if not all(-(2**63) <= value < 2**63 for value in (low, high)):
        raise wrong(ValueError, "seed", "ints from -2^63 to 2^63 - 1", shown_sizes([low, high]))
    return low, high


def index_list(index: Any) -> Any:
    """index as the operators take it."""
    return block_sizes(index, "index")


def draws(x, seed, index):
    """What random rounding draws from: (seed, stream), and the places of x's elements."""
    if seed is None:
        if index is not None:
            raise wrong(ValueError, "index", "None without seed", shown_sizes(index))
        return
    tensor("seed", seed, None)
    if seed.dtype != torch.int64 or tuple(seed.shape) != (2,):
        found = f"{seed.dtype} of shape {tuple(seed.shape)}"
        raise wrong(TypeError, "seed", "torch.int64 of shape (2,)", found)
    if seed.device not in (x.device, torch.device("cpu")):
        expected = f"device {x.device}, that of x, or cpu"
        raise wrong(RuntimeError, "seed", expected, seed.device)
    if index is None:
        return
    shape = tuple(x.shape)
    if len(index) != 1 + len(shape):
        expected = f"an offset and a stride for each dimension of x of shape {shape}"
        raise wrong(ValueError, "index", expected, shown_sizes(index))
    if any(isinstance(v, int) and not -(2**63) <= v < 2**63 for v in index):
        raise wrong(ValueError, "index", "ints from -2^63 to 2^63 - 1", shown_sizes(index))
    if known(x.numel() == 0):
        return
    ends = [stride * (size - 1) for stride, size in zip(index[1:], shape, strict=True)]
    # Of symbols the kernel asks: a guard here would bound the sizes of what is exported.
    least = index[0] + sum(e for e in ends if known(e < 0))
    most = index[0] + sum(e for e in ends if not known(e < 0))
    if known(least < 0) or known(most > LARGEST_INDEX):
        raise ValueError(
            f"index: expected places of x's elements in [0, 2^63 - 1], got {shown_sizes(index)} "
            f"for x of shape {shape}"
        )


LARGEST_INDEX = 2**63 - 1


def _list_of_ints(name, value):
    if _are_ints(value):
        return value
    ints = list(map(number, value)) if isinstance(value, (list, tuple)) else value
    if not _are_ints(ints):
        raise wrong(TypeError, name, "a list of ints", shown_sizes(value))
    return ints


def shard(global_shape, start):
    """Both as lists of ints."""
    global_shape, start = _list_of_ints("global_shape", global_shape), _list_of_ints("start", start)
    if len(global_shape) != len(start):
        sizes = f"{len(global_shape)} ints, one per dimension of {shown_sizes(list(global_shape))}"
        raise wrong(ValueError, "start", sizes, shown_sizes(list(start)))
    for n, at in zip(global_shape, start, strict=True):
        if _surely(n < 0):
            sizes = shown_sizes(list(global_shape))
            raise wrong(ValueError, "global_shape", "sizes from 0 on", sizes)
        if _surely(at < 0) or _surely(at > n):
            within = f"a place within {shown_sizes(list(global_shape))}"
            raise wrong(ValueError, "start", within, shown_sizes(list(start)))
    return global_shape, start


def packable(x, f):
    """Whole bytes along the last dimension."""
    if f.per_byte > 1 and (x.dim() == 0 or _surely(x.shape[-1] % f.per_byte != 0)):
        raise ValueError(
            f"x: expected a last size that {f.per_byte} divides for {f.name}, "
            f"got shape {tuple(x.shape)}"
        )


def choose_qparams_format(
    x, block_size, q_min, q_max, eps, symmetric, format, *, include_zero=False, scale_dtype=None,
    scale_rule=None, global_scale=None,
):  # fmt: skip
    tensor("x", x)
    f = format_named(format)
    q_range(q_min, q_max, f, f.name)
    scale_choice(f, symmetric, eps, scale_dtype, scale_rule, global_scale)
    _choice(x, block_size, eps, symmetric, include_zero, short=True)
    if global_scale is not None:
        sizes = zip(x.shape, block_size or (), strict=False)
        global_parameter(global_scale, "x", x, [blocks_in(n, b) for n, b in sizes])


def dynamic_quantize_format(
    x, block_size, q_min, q_max, eps, symmetric, format, *, seed=None, index=None,
    round_first=False, output_dtype=None, **choosing,
):  # fmt: skip
    choose_qparams_format(x, block_size, q_min, q_max, eps, symmetric, format, **choosing)
    draws(x, seed, index)
    rounding(format_named(format), round_first, seed)
    packable(x, format_named(format))
    output_of(output_dtype)


def fake_quantize_format(
    x, scale, zero_point, q_min, q_max, format, *, block_size=None, global_scale=None, seed=None,
    index=None, round_first=False,
):  # fmt: skip
    tensor("x", x)
    f = format_named(format)
    q_range(q_min, q_max, f, f.name)
    draws(x, seed, index)
    rounding(f, round_first, seed)
    format_parameters("x", x, x.shape, f, scale, zero_point, block_size, global_scale)


def quantize_format(x, scale, zero_point, q_min, q_max, format, **options):
    fake_quantize_format(x, scale, zero_point, q_min, q_max, format, **options)
    packable(x, format_named(format))


def measure(
    x, scale, zero_point, q_min, q_max, format, *, block_size=None, global_scale=None,
    round_first=False, over=None,
):  # fmt: skip
    fake_quantize_format(
        x, scale, zero_point, q_min, q_max, format, block_size=block_size,
        global_scale=global_scale, round_first=round_first,
    )  # fmt: skip
    if over is not None:
        blocks(over, x.shape, short=True, name="over")


def measured_steps(x, scale, zero_point):
    """That version 1's steps of x are float32 steps: codes of others are not those that are measured."""
    dtype = x.dtype if x.is_floating_point() else torch.float32
    # Beside float32 torch promotes to a wider dtype alone. Integer zero points become scale's first.
    added = zero_point.dtype if zero_point.is_floating_point() else scale.dtype
    for p, own in ((scale, scale.dtype), (zero_point, added)):
        if own == torch.float64 and (p.dim() > 0 or x.dim() == 0):
            dtype = own
    if dtype != torch.float32:
        raise ValueError(
            f"x: quantize_tensor takes steps in {dtype} with these parameters, but errors are measured "
            "of float32 steps; pass compute_dtype=torch.float32 where the parameters are chosen"
        )


def join_measures(limbs, max_error, counts, digits):
    for name, t, dtype in (
        ("limbs", limbs, torch.int64),
        ("max_error", max_error, torch.float32),
        ("counts", counts, torch.int64),
    ):
        tensor(name, t, ((dtype,), str(dtype)))
    if tuple(limbs.shape[-2:]) != (2, digits):
        raise wrong(ValueError, "limbs", f"shape (..., 2, {digits})", tuple(limbs.shape))
    for name, t, rest in (("max_error", max_error, ()), ("counts", counts, (2,))):
        expected = (*limbs.shape[:-2], *rest)
        if tuple(t.shape) != expected:
            raise wrong(ValueError, name, f"shape {expected}", tuple(t.shape))
        _same(RuntimeError, name, "device", t.device, limbs.device, ", that of limbs")
    # Read where that makes nobody wait, and where there are values.
    traced = torch.compiler.is_compiling() or _torch.is_tracing() or _torch.may_be_transformed()
    if limbs.device.type != "cpu" or _torch.is_fake(limbs) or traced:
        return
    wrong_digits = limbs[(limbs < 0) | (limbs >> 32 > 0) & (torch.arange(digits) == digits - 1)]
    if wrong_digits.numel() > 0:
        expected = "digits from 0 on, and below 2^32 the last of each sum"
        raise wrong(ValueError, "limbs", expected, wrong_digits[0].item())


def output_of(output_dtype):
    if not any(output_dtype is d for d in (None, torch.float16, torch.bfloat16, torch.float32)):
        expected = "None, torch.float16, torch.bfloat16 or torch.float32"
        raise wrong(TypeError, "output_dtype", expected, shown(output_dtype))


def dequantize_format(
    q, scale, zero_point, format, *, block_size=None, global_scale=None, output_dtype=None
):
    f = format_named(format)
    if f.per_byte == 1 and f.has_zero_point:
        tensor("q", q)
    else:
        codes("q", q, f)
    if f.per_byte > 1 and q.dim() == 0:
        raise wrong(ValueError, "q", f"at least one dimension for {f.name}", "shape ()")
    output_of(output_dtype)
    shape = elements_of(q.shape, f)
    format_parameters("q", q, shape, f, scale, zero_point, block_size, global_scale)


def elements_of(shape, f):
    """The shape of the elements whose codes have a shape."""
    return shape if f.per_byte == 1 else (*shape[:-1], shape[-1] * f.per_byte)


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
        tensor(name, out, None)
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
