"""How scale and zero_point are chosen from the numbers that share them (docs/numerics.md, section 2).

Below stand the schemes that have names: :data:`SCHEMES`.

A scheme gets the tensor, a reduction over what shares a scale, the limits, the smallest scale and the
scale rule. A new rule is a line of RULES, a new scheme stands beside the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from .formats import HALF_DTYPES, Format, rounded

# over(torch.amax, t): the maximum of t over each block, in the shape of scale
Over = Callable[[Callable[..., torch.Tensor], torch.Tensor], torch.Tensor]
Chosen = tuple[torch.Tensor, torch.Tensor]


def default_eps(f: Format) -> float:
    """The smallest scale where none is given: of float formats the smallest normal float32."""
    return 1e-8 if f.has_zero_point else 2.0**-126


def _scale(width: torch.Tensor, divisor: float, eps: float) -> torch.Tensor:
    """width / divisor, raised to eps."""
    # A true division on every device: by a tensor, never by a number (CUDA would multiply by 1 / n).
    wide = torch.float32 if width.dtype in HALF_DTYPES else width.dtype
    steps = torch.full((), divisor, dtype=wide, device=width.device)
    smallest = torch.full((), float(eps), dtype=torch.float64, device=width.device)
    scale = (width.to(wide) / steps).to(width.dtype)
    return torch.maximum(scale, rounded(smallest, width.dtype))


def _largest(max_abs: torch.Tensor, q_min: int, q_max: int, eps: float) -> torch.Tensor:
    """max |x| becomes q_max."""
    return _scale(max_abs, max(q_max, 1), eps)


def _half_range(max_abs: torch.Tensor, q_min: int, q_max: int, eps: float) -> torch.Tensor:
    """max |x| becomes half of what lies between the limits: 127.5 for int8."""
    return _scale(max_abs, max(q_max - q_min, 1) / 2, eps)


# Of symmetric scales, by name: from max |x|, q_min, q_max and eps.
RULES = {None: _largest, "half_range": _half_range}


def symmetric(
    x: torch.Tensor, over: Over, q_min: int, q_max: int, eps: float, include_zero: bool,
    scale_rule: str | None,
) -> Chosen:  # fmt: skip
    """The scale of max |x| by the rule, and no zero point."""
    scale = RULES[scale_rule](over(torch.amax, x.abs()), q_min, q_max, eps)
    return scale, torch.zeros_like(scale)


def asymmetric(
    x: torch.Tensor, over: Over, q_min: int, q_max: int, eps: float, include_zero: bool,
    scale_rule: str | None,
) -> Chosen:  # fmt: skip
    """min x becomes q_min, and max x q_max."""
    x_min, x_max = over(torch.amin, x), over(torch.amax, x)
    if include_zero:
        zero = torch.zeros_like(x_min)
        x_min, x_max = torch.minimum(x_min, zero), torch.maximum(x_max, zero)
    # + 0.0: the order of a reduction decides between 0.0 and -0.0; no scale may become -0.0.
    scale = _scale((x_max + 0.0) - x_min, max(q_max - q_min, 1), eps)
    low = torch.full_like(x_min, q_min)
    return scale, torch.clamp(low - torch.round(x_min / scale), q_min, q_max)


# ---- by name ----------------------------------------------------------------------------------------

_ZERO = {"sym": False, "include_zero": True}
# What a name does, in one line, and the keywords of dynamic_quantize. Sizes of blocks are those of the
# last dimensions.
_NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "int8_tensor": ("int8, one scale", {"dtype": "int8"}),
    "int8_channel": ("int8, a scale for each index of dimension 0",
        {"dtype": "int8", "per_channel": True}),
    "int8_token": ("int8, a scale for each row of the last dimension",
        {"dtype": "int8", "block_size": (-1,)}),
    "uint8_tensor": ("uint8, one scale and zero point", {"dtype": "uint8", **_ZERO}),
    "uint8_token": ("uint8, a scale and zero point for each row of the last dimension",
        {"dtype": "uint8", "block_size": (-1,), **_ZERO}),
    "int4_group128": ("int4, packed, a scale for 128 numbers of the last dimension",
        {"dtype": "int4", "block_size": (128,)}),
    "fp8_tensor": ("float8_e4m3fn, one scale", {"dtype": "float8_e4m3fn"}),
    "fp8_token": ("float8_e4m3fn, a scale for each row of the last dimension",
        {"dtype": "float8_e4m3fn", "block_size": (-1,)}),
    "fp8_group128": ("float8_e4m3fn, a scale for 128 numbers of the last dimension",
        {"dtype": "float8_e4m3fn", "block_size": (128,)}),
    "fp8_block128": ("float8_e4m3fn, a scale for 128 x 128 numbers of the last two dimensions",
        {"dtype": "float8_e4m3fn", "block_size": (128, 128)}),
}  # fmt: skip
#: The schemes of :func:`quantkit.quantize`, and what each is. All take float32 steps.
SCHEMES: Mapping[str, str] = MappingProxyType({name: text for name, (text, _) in _NAMED.items()})


def keywords_of(scheme: object) -> Mapping[str, Any]:
    """The keywords of dynamic_quantize that a scheme stands for, which may be such a mapping itself."""
    if isinstance(scheme, Mapping):
        return scheme
    if not isinstance(scheme, str):
        raise TypeError(f"scheme: expected a str or a mapping, got {type(scheme).__name__}")
    if scheme not in _NAMED:
        raise ValueError(f"scheme: expected one of {', '.join(_NAMED)}, got {scheme[:40]!r}")
    return {"compute_dtype": torch.float32, **_NAMED[scheme][1]}
