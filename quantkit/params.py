"""The parameters of an affine quantization, and the arguments that stand for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from . import _checks, _torch


@dataclass(eq=False)
class QuantizationParams:
    """The parameters of ``q = clip(round(x / scale + zero_point), q_min, q_max)``.

    Args:
        scale, zero_point: tensors whose shapes say the granularity. 0-dim is the whole tensor. Otherwise
            the rank is x's and each size divides x's: element i of a dimension uses index
            ``i // (x.size / scale.size)``. A Python number becomes a 0-dim float64 tensor.
        q_min, q_max: the inclusive limits of the codes.
        dtype: the dtype of the codes. None stands for int8 where [q_min, q_max] fits it, else uint8,
            else int16.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    q_min: int
    q_max: int
    dtype: torch.dtype | None = field(default=None, repr=False, kw_only=True)

    if TYPE_CHECKING:  # numbers come in, what is read is taken for tensors

        def __init__(
            self,
            scale: torch.Tensor | float,
            zero_point: torch.Tensor | float,
            q_min: int,
            q_max: int,
            *,
            dtype: torch.dtype | None = None,
        ) -> None: ...

    def __eq__(self, other: object) -> bool:
        """By contents: tensors by dtype, shape, device and bits, without any (meta, fake) by identity."""
        if type(other) is not type(self):
            return False
        tensors = ((self.scale, other.scale), (self.zero_point, other.zero_point))
        try:
            return _limits(self) == _limits(other) and all(_same(a, b) for a, b in tensors)
        except (RuntimeError, TypeError, ValueError):  # of values that no operator would take
            return False

    def __hash__(self) -> int:
        return hash(_limits(self))

    def to(self, device: torch.device | str | int) -> QuantizationParams:
        """The same parameters on a device; numbers stay numbers."""
        scale, zero_point = (
            t.to(device=device) if isinstance(t, torch.Tensor) else t
            for t in (self.scale, self.zero_point)
        )
        return replace(self, scale=scale, zero_point=zero_point)


torch.serialization.add_safe_globals([QuantizationParams])  # for torch.load(weights_only=True)

_Limits = tuple[int, int, torch.dtype | None]


def _limits(p: QuantizationParams) -> _Limits:
    return _checks.number(p.q_min), _checks.number(p.q_max), p.dtype


def _same(a: Any, b: Any) -> bool:
    """Whether two tensors, or numbers that stand for them, have the same contents."""
    if a is b:
        return True
    pair = [_as_tensor("scale", t) for t in (a, b)]
    for t in pair:
        if not isinstance(t, torch.Tensor) or t.is_meta or _torch.is_fake(t):
            return False
        # Of others torch reads no bytes; of a quantized one it crashes.
        if t.layout is not torch.strided or t.is_quantized or t.is_nested:
            return False
    one, other = pair
    if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
        return False
    bits = [t.detach().resolve_neg().reshape(-1).contiguous().view(torch.uint8) for t in pair]
    return torch.equal(*bits)


def _tensors(p: QuantizationParams) -> tuple[list[Any], _Limits]:
    return [p.scale, p.zero_point], _limits(p)


def _named_tensors(p: QuantizationParams) -> tuple[list[Any], _Limits]:
    keys = (_torch.pytree_key("scale"), _torch.pytree_key("zero_point"))
    return list(zip(keys, (p.scale, p.zero_point), strict=True)), _limits(p)


def _of_tensors(tensors: Iterable[Any], limits: _Limits) -> QuantizationParams:
    scale, zero_point = tensors
    q_min, q_max, dtype = limits
    return QuantizationParams(scale, zero_point, q_min, q_max, dtype=dtype)


def _limits_as_text(limits: _Limits) -> str:
    q_min, q_max, dtype = limits
    return json.dumps([q_min, q_max, None if dtype is None else str(dtype).removeprefix("torch.")])


def _limits_of_text(text: str) -> _Limits:
    q_min, q_max, name = json.loads(text)
    if name is None:
        return q_min, q_max, None
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):  # the text may come from anyone
        raise ValueError(f"QuantizationParams: expected the name of a torch.dtype, got {name!r}")
    return q_min, q_max, dtype


# So that export, vmap and torch.func take it and return it: two tensors, and the limits as they are.
_torch.register_pytree_node(
    QuantizationParams,
    _tensors,
    _of_tensors,
    flatten_with_keys_fn=_named_tensors,
    serialized_type_name="quantkit.QuantizationParams",
    to_dumpable_context=_limits_as_text,
    from_dumpable_context=_limits_of_text,
)


# ---- from the arguments of functions to those of operators --------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(_checks.number(value), (int, float))


def _as_tensor(name: str, value: Any) -> Any:
    """A number as a 0-dim tensor on the CPU, whatever the default device; anything else as it is."""
    if isinstance(value, torch.Tensor) or not _is_number(value):
        return value
    value = _checks.to_float(name, _checks.number(value))
    return torch.tensor(value, dtype=torch.float64, device="cpu")


# Where a type is compared here the usual case is spared a call.


def unpack(qparams: QuantizationParams) -> tuple[torch.Tensor, torch.Tensor, int, int, int]:
    """scale and zero_point as tensors, the limits, and torch's number of the codes' dtype."""
    try:
        scale, zero_point = qparams.scale, qparams.zero_point
        q_min, q_max = qparams.q_min, qparams.q_max
    except AttributeError:
        raise _checks.wrong(
            TypeError, "qparams", "a QuantizationParams", type(qparams).__name__
        ) from None
    if type(scale) is not torch.Tensor:
        scale = _as_tensor("scale", scale)
    if type(zero_point) is not torch.Tensor:
        zero_point = _as_tensor("zero_point", zero_point)
    dtype = getattr(qparams, "dtype", None)  # quant_tool's parameters have none
    if dtype is None:
        q_min, q_max = _checks.number(q_min), _checks.number(q_max)
        return scale, zero_point, q_min, q_max, _checks.smallest_format(q_min, q_max).number
    code = _checks.format_of(dtype).number
    if type(q_min) is not int or type(q_max) is not int:
        q_min, q_max = _checks.integer("q_min", q_min), _checks.integer("q_max", q_max)
    return scale, zero_point, q_min, q_max, code


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


def choice(
    x: torch.Tensor, per_channel: bool, channel_dim: int, block_size: Sequence[int] | None,
    dtype: torch.dtype, q_min: int | None, q_max: int | None,
    eps: float, symmetric: bool, include_zero: bool,
) -> tuple[Sequence[int] | None, int, int, float, bool, bool, int]:  # fmt: skip
    """The operators' arguments from block_size to include_zero, and torch's number of dtype."""
    code = _checks.format_of(dtype)
    if q_min is None and q_max is None:
        low, high = code.low, code.high
    else:
        low = code.low if q_min is None else _checks.integer("q_min", q_min)
        high = code.high if q_max is None else _checks.integer("q_max", q_max)
        _checks.q_range(low, high, code)
    if per_channel is not False and _checks.flag("per_channel", per_channel):
        block_size = _channel(x, channel_dim, block_size)
    elif block_size is not None:
        block_size = _checks.block_sizes(block_size)
    if type(symmetric) is not bool or type(include_zero) is not bool:
        symmetric = _checks.flag("symmetric (sym)", symmetric)
        include_zero = _checks.flag("include_zero", include_zero)
    if type(eps) is not float:
        eps = _checks.real("eps", eps)
    return block_size, low, high, eps, symmetric, include_zero, code.number
