"""The parameters of an affine quantization, and the arguments that stand for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from . import _checks, _torch
from .formats import CODED_SCALES, VERSION_1, Format
from .schemes import default_eps


@dataclass(eq=False, repr=False)
class QuantizationParams:
    """The parameters of ``q = clip(round(x / scale + zero_point), q_min, q_max)``.

    Args:
        scale, zero_point: tensors whose shapes say the granularity. 0-dim is the whole tensor. Otherwise
            the rank is x's and each size divides x's: element i of a dimension uses index
            ``i // (x.size / scale.size)``. A Python number stays one, and counts as a 0-dim float64
            tensor. Operators take tensors only: ``torch.tensor(0.02)``. Float formats have no zero
            point: what stands there is not read. Float32 steps take None as a zero point of 0; version
            1's do not. A scale may be coded: torch.float8_e8m0fnu or torch.float8_e4m3fn.
        q_min, q_max: the inclusive limits of the codes.
        dtype: of the codes' format, such as ``torch.int4`` or ``torch.float4_e2m1fn_x2``. None stands
            for int8 where [q_min, q_max] fits it, else uint8, else int16.
        block_size: one int for each dimension of x, -1 for a whole dimension. Where it and scale have
            x's rank, scale must have one value for each block, and a last block may be short. None: the
            shapes alone say the granularity.
        global_scale: what multiplies scale in every step: 0-dim, or of scale's rank with sizes that
            divide scale's. NVFP4 has one.
        compute_dtype: torch.float32 for float32 steps: each is one float32 operation. None: version 1's,
            in x's dtype, where dtype has them (int8, uint8, int16). docs/usage.md compares the two.
        round_first: whether the zero point is added after rounding, as ONNX does, in float32 steps.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    q_min: int
    q_max: int
    dtype: torch.dtype | None = field(default=None, kw_only=True)
    block_size: tuple[int, ...] | None = field(default=None, kw_only=True)
    global_scale: torch.Tensor | None = field(default=None, kw_only=True)
    compute_dtype: torch.dtype | None = field(default=None, kw_only=True)
    round_first: bool = field(default=False, kw_only=True)

    if TYPE_CHECKING:  # numbers come in, what is read is taken for tensors

        def __init__(
            self,
            scale: torch.Tensor | float,
            zero_point: torch.Tensor | float | None,
            q_min: int,
            q_max: int,
            *,
            dtype: torch.dtype | None = None,
            block_size: Sequence[int] | None = None,
            global_scale: torch.Tensor | float | None = None,
            compute_dtype: torch.dtype | None = None,
            round_first: bool = False,
        ) -> None: ...

    def __repr__(self) -> str:
        """Version 1's fields, and the others where they are set; of many elements shape and dtype."""
        names = ["scale", "zero_point", "q_min", "q_max"]
        names += [] if self.dtype in _DTYPES_OF_VERSION_1 else ["dtype"]
        options = ("block_size", "global_scale", "compute_dtype")
        names += [name for name in options if getattr(self, name) is not None]
        names += ["round_first"] if self.round_first else []
        fields = (f"{name}={_text(getattr(self, name))}" for name in names)
        return f"{type(self).__name__}({', '.join(fields)})"

    def __eq__(self, other: object) -> bool:
        """By contents: tensors by dtype, shape, device and bits, without any (meta, fake) by identity.

        block_size counts where pytrees keep it: beside float32 steps or a format of version 2.
        """
        if type(other) is not type(self):
            return False
        try:
            if _context(self) != _context(other):
                return False
            pairs = zip(_leaves(self), _leaves(other), strict=True)
            return all(same(a, b) for a, b in pairs)
        except (RuntimeError, TypeError, ValueError):  # of values that no operator would take
            return False

    def __hash__(self) -> int:
        return hash(_limits(self))

    def to(self, device: torch.device | str | int) -> QuantizationParams:
        """The same parameters on a device; numbers stay numbers."""
        scale, zero_point, global_scale = (
            t.to(device=device) if isinstance(t, torch.Tensor) else t
            for t in (self.scale, self.zero_point, self.global_scale)
        )
        tensors: dict[str, Any] = {"scale": scale, "zero_point": zero_point}
        return replace(self, **tensors, global_scale=global_scale)


def _text(value: object) -> str:
    """A value in a line; a tensor of many elements as torch shows those without any."""
    if isinstance(value, torch.Tensor) and not (value.is_nested or _torch.is_fake(value)):
        if value.numel() > 8 and not value.is_meta:
            place = "" if value.device.type == "cpu" else f", device='{value.device}'"
            return f"tensor(..., size={tuple(value.shape)}, dtype={value.dtype}{place})"
        return " ".join(repr(value).split())
    return repr(value)


torch.serialization.add_safe_globals([QuantizationParams])  # for torch.load(weights_only=True)

_DTYPES_OF_VERSION_1 = (None, *(f.dtype for f in VERSION_1))
_TENSORS = ("scale", "zero_point", "global_scale")
_Limits = tuple[int, int, torch.dtype | None]
# Version 1's limits, or those and block_size, compute_dtype and round_first.
_Context = tuple[Any, ...]


def _limits(p: QuantizationParams) -> _Limits:
    return _checks.number(p.q_min), _checks.number(p.q_max), p.dtype


def _leaves(p: QuantizationParams) -> list[Any]:
    """The tensors; global_scale where there is one."""
    tensors = [p.scale, p.zero_point]
    return tensors if p.global_scale is None else [*tensors, p.global_scale]


def _context(p: QuantizationParams) -> _Context:
    """All else, in version 1's form where it says all: programs that version 1 exported know no other."""
    plain = p.compute_dtype is None and p.global_scale is None and not p.round_first
    if plain and p.dtype in _DTYPES_OF_VERSION_1:
        return _limits(p)
    blocks = None if p.block_size is None else tuple(map(_checks.number, p.block_size))
    return *_limits(p), blocks, p.compute_dtype, bool(p.round_first)


def same(a: Any, b: Any) -> bool:
    """Whether two tensors, or numbers that stand for them, have the same contents."""
    if a is b:
        return True
    pair = [as_tensor("scale", t) for t in (a, b)]
    for t in pair:
        if not isinstance(t, torch.Tensor) or t.is_meta or _torch.is_fake(t):
            return False
        # Of others torch reads no bytes; of a quantized one it crashes.
        if t.layout is not torch.strided or t.is_quantized or t.is_nested:
            return False
    one, other = pair
    if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
        return False
    # A copy has the strides of its shape; a size of 1 may have any, which a view of bytes refuses.
    copies = (t.detach().clone(memory_format=torch.contiguous_format) for t in pair)
    bits = [t.resolve_neg().reshape(-1).view(torch.uint8) for t in copies]
    return torch.equal(*bits)


def _flat(p: QuantizationParams) -> tuple[list[Any], _Context]:
    return _leaves(p), _context(p)


def _flat_with_keys(p: QuantizationParams) -> tuple[list[Any], _Context]:
    leaves = _leaves(p)
    keys = map(_torch.pytree_key, _TENSORS[: len(leaves)])
    return list(zip(keys, leaves, strict=True)), _context(p)


def _of_leaves(leaves: Iterable[Any], context: _Context) -> QuantizationParams:
    scale, zero_point, *rest = leaves
    q_min, q_max, dtype, *options = context
    block_size, compute_dtype, round_first = options or (None, None, False)
    return QuantizationParams(
        scale, zero_point, q_min, q_max, dtype=dtype, block_size=block_size,
        global_scale=rest[0] if rest else None, compute_dtype=compute_dtype, round_first=round_first,
    )  # fmt: skip


def _context_as_text(context: _Context) -> str:
    def text(value: Any) -> Any:
        return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value

    return json.dumps([text(value) for value in context])


def _context_of_text(text: str) -> _Context:
    """The text may come from anyone."""
    q_min, q_max, *others = json.loads(text)
    if len(others) == 1:
        return q_min, q_max, _dtype_of_text(others[0])
    dtype, block_size, compute_dtype, round_first = others
    blocks = None if block_size is None else tuple(_checks.block_sizes(block_size))
    return (
        q_min, q_max, _dtype_of_text(dtype), blocks, _dtype_of_text(compute_dtype),
        _checks.flag("round_first", round_first),
    )  # fmt: skip


def _dtype_of_text(name: Any) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"QuantizationParams: expected the name of a torch.dtype, got {name!r}")
    return dtype


# So that export, vmap and torch.func take it and return it: tensors, and all else as it is.
_torch.register_pytree_node(
    QuantizationParams,
    _flat,
    _of_leaves,
    flatten_with_keys_fn=_flat_with_keys,
    serialized_type_name="quantkit.QuantizationParams",
    to_dumpable_context=_context_as_text,
    from_dumpable_context=_context_of_text,
)


# ---- from the arguments of functions to those of operators --------------------------------------------


def as_tensor(name: str, value: Any) -> Any:
    """A number as a 0-dim tensor on the CPU, whatever the default device; a tensor as it is.

    So is None, which stands for no zero point or no global scale.
    """
    if isinstance(value, torch.Tensor) or (value is None and name != "scale"):
        return value
    number = _checks.number(value)
    if not isinstance(number, (int, float)):
        raise _checks.wrong(TypeError, name, "a torch.Tensor or a number", type(value).__name__)
    number = _checks.to_float(name, number)
    return torch.tensor(number, dtype=torch.float64, device="cpu")


def as_seed(seed: Any) -> Any:
    """An int, or a pair of ints (seed, stream), as int64 of shape (2,) on the CPU; a tensor as it is."""
    if seed is None or isinstance(seed, torch.Tensor):
        return seed
    pair = _checks.seed_pair(seed)
    return torch.tensor(pair, dtype=torch.int64, device="cpu")


# Where a type is compared here the usual case is spared a call.
_OPTIONS = ("dtype", "block_size", "global_scale", "compute_dtype", "round_first")
_is_compiling = torch.compiler.is_compiling


def unpack(
    name: str, x: torch.Tensor, qparams: QuantizationParams, float32: bool = False
) -> tuple[torch.Tensor, Any, int, int, Format, dict[str, Any] | None]:
    """scale, zero_point, the limits, the format, and what .format operators take by name.

    That is None for version 1's steps. float32: whether an argument asks for the others.
    """
    try:
        scale, zero_point = qparams.scale, qparams.zero_point
        q_min, q_max = qparams.q_min, qparams.q_max
    except AttributeError:
        raise _checks.wrong(
            TypeError, "qparams", "a QuantizationParams", type(qparams).__name__
        ) from None
    if type(scale) is not torch.Tensor:
        scale = as_tensor("scale", scale)
    if type(zero_point) is not torch.Tensor:
        zero_point = as_tensor("zero_point", zero_point)
    dtype: Any
    block_size: Any
    round_first: Any
    if type(qparams) is QuantizationParams:
        dtype, block_size, global_scale = qparams.dtype, qparams.block_size, qparams.global_scale
        compute_dtype, round_first = qparams.compute_dtype, qparams.round_first
    else:  # quant_tool's parameters have no more
        dtype, block_size, global_scale, compute_dtype, round_first = (
            getattr(qparams, name, None) for name in _OPTIONS
        )
        round_first = False if round_first is None else round_first
    if dtype is None:
        q_min, q_max = _checks.number(q_min), _checks.number(q_max)
        f = _checks.smallest_format(q_min, q_max)
    else:
        f = _checks.format_of(dtype)
        if type(q_min) is not int or type(q_max) is not int:
            q_min, q_max = _checks.integer("q_min", q_min), _checks.integer("q_max", q_max)
    version_1 = not float32 and is_version_1(f, compute_dtype, round_first, global_scale)
    if version_1 and isinstance(scale, torch.Tensor) and scale.dtype in CODED_SCALES:
        version_1 = False
    if block_size is not None:
        block_size = _blocks_of(name, x, scale, f, block_size, version_1)
    if version_1:
        if zero_point is None:
            expected = "a torch.Tensor or a number; None needs compute_dtype=torch.float32"
            raise _checks.wrong(TypeError, "zero_point", expected, "NoneType")
        return scale, zero_point, q_min, q_max, f, None
    options = {
        "block_size": block_size,
        "global_scale": as_tensor("global_scale", global_scale),
        "round_first": bool(round_first),
    }
    return scale, zero_point if f.has_zero_point else None, q_min, q_max, f, options


def is_version_1(f: Format, compute_dtype: Any, round_first: Any, *others: Any) -> bool:
    """Whether a call takes version 1's steps; what of version 2 is not None asks for float32 steps."""
    first = round_first is not False and _checks.flag("round_first", round_first)
    if compute_dtype is not None:
        _checks.compute_dtype(compute_dtype)
        return False
    if first:
        return False
    for option in others:  # all() of a generator takes four times as long
        if option is not None:
            return False
    return f.number is not None


def _blocks_of(
    name: str, x: torch.Tensor, scale: Any, f: Format, block_size: Any, version_1: bool
) -> Sequence[int] | None:
    """block_size where it says what the parameters are for; None where their shapes do."""
    if version_1 and not _is_compiling() and _is_one_for_each_block(x, scale, block_size):
        return block_size
    block_size = _checks.block_sizes(block_size)
    if not isinstance(x, torch.Tensor) or not isinstance(scale, torch.Tensor):
        return None  # the operator says what they are not
    if not len(block_size) == x.dim() == scale.dim() or x.is_nested or scale.is_nested:
        return None
    shape = _checks.elements_of(x.shape, f) if name == "q" else x.shape
    _checks.blocks(block_size, shape, name, short=not version_1)
    _checks.block_parameter("scale", scale, shape, block_size, name)
    return block_size


def _is_one_for_each_block(x: torch.Tensor, scale: Any, block_size: Any) -> bool:
    """The usual case of whole blocks, at the price of a comparison for each dimension."""
    if type(x) is not torch.Tensor or type(scale) is not torch.Tensor or x.is_nested:
        return False
    shape, sizes = x.shape, scale.shape
    if type(block_size) is not tuple or not len(block_size) == len(shape) == len(sizes):
        return False
    for n, b, s in zip(shape, block_size, sizes, strict=True):
        if type(b) is not int or (s != 1 if b == -1 else b < 1 or s * b != n):
            return False
    return True


def _channel(x: torch.Tensor, channel_dim: int, block_size: Sequence[int] | None) -> Any:
    """The operators' block_size for per_channel=True."""
    if block_size is not None:
        raise ValueError(
            "block_size: cannot be given together with per_channel=True, "
            f"got {_checks.shown_sizes(block_size)}"
        )
    if type(x) is not torch.Tensor:
        _checks.tensor("x", x)
    if type(channel_dim) is not int:
        channel_dim = _checks.integer("channel_dim", channel_dim)
    rank = x.dim()
    if rank == 0:
        return None
    if not -rank <= channel_dim < rank:
        expected = f"a value in [{-rank}, {rank - 1}] for x of shape {tuple(x.shape)}"
        raise _checks.wrong(IndexError, "channel_dim", expected, _checks.shown(channel_dim))
    blocks = [-1] * rank
    if rank > 1:  # a vector is one channel: quant_tool reduces over it whole
        blocks[channel_dim] = 1
    return blocks


def granularity(
    x: torch.Tensor, per_channel: bool, channel_dim: int, block_size: Sequence[int] | None
) -> Sequence[int] | None:
    """The operators' block_size."""
    if per_channel is not False and _checks.flag("per_channel", per_channel):
        return _channel(x, channel_dim, block_size)
    return None if block_size is None else _checks.block_sizes(block_size)


def choice(
    x: torch.Tensor, per_channel: bool, channel_dim: int, block_size: Sequence[int] | None,
    dtype: torch.dtype | str, q_min: int | None, q_max: int | None,
    eps: float | None, symmetric: bool, include_zero: bool,
    scale_dtype: torch.dtype | None = None, scale_rule: str | None = None,
) -> tuple[Format, Sequence[int] | None, int, int, float, bool, bool]:  # fmt: skip
    """The format, and the operators' arguments from block_size to include_zero."""
    f = _checks.format_given(dtype)
    if q_min is None and q_max is None:
        low, high = f.low, f.high
    else:
        low = f.low if q_min is None else _checks.integer("q_min", q_min)
        high = f.high if q_max is None else _checks.integer("q_max", q_max)
        if not f.has_zero_point:  # those of float formats are symmetric
            low = -high if q_min is None else low
            high = -low if q_max is None else high
        _checks.q_range(low, high, f)
    if per_channel is not False or block_size is not None:
        block_size = granularity(x, per_channel, channel_dim, block_size)
    if type(symmetric) is not bool or type(include_zero) is not bool:
        symmetric = _checks.flag("symmetric (sym)", symmetric)
        include_zero = _checks.flag("include_zero", include_zero)
    smallest = default_eps(f, scale_dtype, scale_rule) if eps is None else eps
    if type(smallest) is not float:
        smallest = _checks.real("eps", smallest)
    return f, block_size, low, high, smallest, symmetric, include_zero


def kept(x: torch.Tensor, block_size: Sequence[int] | None) -> tuple[int, ...] | None:
    """block_size as QuantizationParams has it: ints only."""
    if not block_size:
        return None
    if not _is_compiling() and set(map(type, block_size)) == {int}:
        return tuple(block_size)
    return tuple(
        -1 if _checks.is_symbol(b) and _checks.known(b == n) else int(b)
        for n, b in zip(x.shape, block_size, strict=True)
    )
