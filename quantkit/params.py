"""The parameters of an affine quantization, and the arguments that stand for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from . import _checks


@dataclass
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


torch.serialization.add_safe_globals([QuantizationParams])  # for torch.load(weights_only=True)

_Limits = tuple[int, int, torch.dtype | None]


def _tensors(p: QuantizationParams) -> tuple[list[Any], _Limits]:
    return [p.scale, p.zero_point], (p.q_min, p.q_max, p.dtype)


def _named_tensors(p: QuantizationParams) -> tuple[list[Any], _Limits]:
    keys = (_pytree.GetAttrKey("scale"), _pytree.GetAttrKey("zero_point"))
    return list(zip(keys, (p.scale, p.zero_point), strict=True)), (p.q_min, p.q_max, p.dtype)


def _of_tensors(tensors: Iterable[Any], limits: _Limits) -> QuantizationParams:
    scale, zero_point = tensors
    q_min, q_max, dtype = limits
    return QuantizationParams(scale, zero_point, q_min, q_max, dtype=dtype)


def _limits_as_text(limits: _Limits) -> str:
    q_min, q_max, dtype = limits
    return json.dumps([q_min, q_max, None if dtype is None else str(dtype).removeprefix("torch.")])


def _limits_of_text(text: str) -> _Limits:
    q_min, q_max, name = json.loads(text)
    return q_min, q_max, None if name is None else getattr(torch, name)


# So that export, vmap and torch.func take it and return it: two tensors, and the limits as they are.
_pytree.register_pytree_node(
    QuantizationParams,
    _tensors,
    _of_tensors,
    flatten_with_keys_fn=_named_tensors,
    serialized_type_name="quantkit.QuantizationParams",
    to_dumpable_context=_limits_as_text,
    from_dumpable_context=_limits_of_text,
)


def _number(name: str, value: float) -> torch.Tensor:
    return torch.tensor(_checks.to_float(name, value), dtype=torch.float64)


def unpack(
    qparams: QuantizationParams,
) -> tuple[torch.Tensor, torch.Tensor, int, int, torch.dtype]:
    """scale and zero_point as tensors, the limits, and the integer dtype spelled out."""
    try:
        scale, zero_point = qparams.scale, qparams.zero_point
        q_min, q_max = qparams.q_min, qparams.q_max
    except AttributeError:
        raise TypeError(
            f"qparams: expected a QuantizationParams, got {type(qparams).__name__}"
        ) from None
    if isinstance(scale, (int, float)):
        scale = _number("scale", scale)
    if isinstance(zero_point, (int, float)):
        zero_point = _number("zero_point", zero_point)
    dtype = getattr(qparams, "dtype", None)  # quant_tool's parameters have none
    if dtype is None:
        dtype = _checks.smallest_dtype(q_min, q_max)
    else:
        _checks.limits(dtype)
        _checks.integers(q_min, q_max)
    return scale, zero_point, q_min, q_max, dtype


def block_size_of(
    x: torch.Tensor, per_channel: bool, channel_dim: int, block_size: Sequence[int] | None
) -> Sequence[int] | None:
    """The operators' ``block_size`` for the public arguments."""
    if not isinstance(per_channel, (int, torch.SymBool)):
        raise TypeError(f"per_channel: expected a bool, got {type(per_channel).__name__}")
    if not per_channel:
        return block_size
    if block_size is not None:
        raise ValueError(
            "block_size: cannot be given together with per_channel=True, "
            f"got {_checks.shown_sizes(block_size)}"
        )
    _checks.tensor("x", x)
    if not isinstance(channel_dim, (int, torch.SymInt)):
        raise TypeError(f"channel_dim: expected an int, got {type(channel_dim).__name__}")
    rank = x.dim()
    if rank == 0:
        return None
    if not -rank <= channel_dim < rank:
        raise IndexError(
            f"channel_dim: expected a value in [{-rank}, {rank - 1}] "
            f"for x of shape {tuple(x.shape)}, got {_checks.shown(channel_dim)}"
        )
    blocks = [-1] * rank
    if rank > 1:  # a vector is one channel: quant_tool reduces over it whole
        blocks[channel_dim] = 1
    return blocks


def limits(dtype: torch.dtype, q_min: int | None, q_max: int | None) -> tuple[int, int]:
    """[q_min, q_max] within dtype's limits, which stand where none was given."""
    low, high = _checks.limits(dtype)
    if q_min is None and q_max is None:
        return low, high
    q_min, q_max = low if q_min is None else q_min, high if q_max is None else q_max
    _checks.q_range(q_min, q_max, dtype)
    return q_min, q_max
