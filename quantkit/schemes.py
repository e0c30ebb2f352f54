"""How scale and zero_point are chosen from the numbers that share them (docs/numerics.md, section 2).

Below stand the schemes that have names: :data:`SCHEMES`.

A scheme gets the tensor, a reduction over what shares a scale, the limits, the smallest scale and how
symmetric scales are made. A new rule is a method of Symmetric, a new scheme stands beside the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from .formats import E4M3, E8M0, HALF_DTYPES, Format, power_of_two, rounded

# over(torch.amax, t): the maximum of t over each block, in the shape of scale
Over = Callable[[Callable[..., torch.Tensor], torch.Tensor], torch.Tensor]
Chosen = tuple[torch.Tensor, torch.Tensor]


def default_eps(
    f: Format, scale_dtype: torch.dtype | None = None, scale_rule: str | None = None
) -> float:
    """The smallest scale where none is given: the smallest normal number of scale's dtype."""
    if scale_dtype is E8M0:
        return 2.0**-127
    if scale_dtype is E4M3.dtype:
        return 2.0**-6
    return 1e-8 if f.has_zero_point and scale_rule in (None, "half_range") else 2.0**-126


def _smallest(eps: float, like: torch.Tensor) -> torch.Tensor:
    """eps in like's dtype."""
    exact = torch.full((), float(eps), dtype=torch.float64, device=like.device)
    return rounded(exact, like.dtype)


def _scale(
    width: torch.Tensor, divisor: float, eps: float, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """width / divisor, and that / global_scale where there is one, raised to eps."""
    # A true division on every device: by a tensor, never by a number (CUDA would multiply by 1 / n).
    wide = torch.float32 if width.dtype in HALF_DTYPES else width.dtype
    steps = torch.full((), divisor, dtype=wide, device=width.device)
    scale = (width.to(wide) / steps).to(width.dtype)
    if global_scale is not None:
        scale = scale / global_scale
    return torch.maximum(scale, _smallest(eps, width))


def _field(v: torch.Tensor) -> torch.Tensor:
    """The exponent fields of float32 numbers that are not negative."""
    return v.view(torch.int32) >> 23


@dataclass(frozen=True)
class Symmetric:
    """How symmetric scales are made: of a format's limits, by a rule, in a dtype.

    Attributes:
        rule: a name of RULES.
        dtype: of scale: None for that of x, or a coded one.
        mantissa: bits of the format's, for "even".
        global_scale: what multiplies the scale in all steps; in scale's shape.
    """

    rule: str | None = None
    dtype: torch.dtype | None = None
    mantissa: int = 0
    global_scale: torch.Tensor | None = None

    def scale(self, max_abs: torch.Tensor, q_min: int, q_max: int, eps: float) -> torch.Tensor:
        rule = POWERS.get(self.rule or ("ceil" if self.dtype == E8M0 else ""))
        if rule is not None:
            c = rule(self, max_abs, q_max, eps).clamp(0, 254)
            c = torch.where(max_abs.isinf(), 254, torch.where(max_abs.isnan(), 255, c))
            return c.to(torch.uint8).view(E8M0) if self.dtype == E8M0 else power_of_two(c)
        divisor = max(q_max - q_min, 1) / 2 if self.rule == "half_range" else max(q_max, 1)
        scale = _scale(max_abs, divisor, eps, self.global_scale)
        if self.dtype == E4M3.dtype:
            return E4M3.encode(scale, E4M3.low, E4M3.high)
        return scale

    def _ceil(self, max_abs: torch.Tensor, q_max: int, eps: float) -> torch.Tensor:
        """The least power of two that is not below the scale; nothing is clipped."""
        scale = _scale(max_abs, max(q_max, 1), eps)
        fraction = scale.view(torch.int32) & 0x7FFFFF
        return torch.where(scale <= 2.0**-127, 0, _field(scale) + (fraction != 0))

    def _floor(self, max_abs: torch.Tensor, q_max: int, eps: float) -> torch.Tensor:
        """max |x| and q_max, each rounded down to a power of two; that of Open Compute's MX."""
        exponent = _field(max_abs) - (max(q_max, 1).bit_length() - 1)
        return torch.maximum(exponent, _field(_smallest(eps, max_abs)))

    def _even(self, max_abs: torch.Tensor, q_max: int, eps: float) -> torch.Tensor:
        """The same of max |x| rounded to the format's mantissa first."""
        half = 1 << (22 - self.mantissa)
        return self._floor((max_abs.view(torch.int32) + half).view(torch.float32), q_max, eps)


LARGEST = Symmetric()  # max |x| becomes q_max

# Rules that make the scale a power of two: its exponent code, before it is clipped.
POWERS = {"ceil": Symmetric._ceil, "floor": Symmetric._floor, "even": Symmetric._even}
RULES = ("half_range", *POWERS)


def powers_of(f: Format) -> tuple[str, ...]:
    """The rules that make powers of two for a format."""
    return tuple(rule for rule in POWERS if rule != "even" or not f.has_zero_point)


def symmetric(
    x: torch.Tensor, over: Over, q_min: int, q_max: int, eps: float, include_zero: bool,
    how: Symmetric,
) -> Chosen:  # fmt: skip
    """The scale of max |x| by the rule, and no zero point."""
    max_abs = over(torch.amax, x.abs())
    return how.scale(max_abs, q_min, q_max, eps), torch.zeros_like(max_abs)


def asymmetric(
    x: torch.Tensor, over: Over, q_min: int, q_max: int, eps: float, include_zero: bool,
    how: Symmetric,
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
    "mxfp8": ("float8_e4m3fn, an E8M0 scale for 32 numbers of the last dimension",
        {"dtype": "float8_e4m3fn", "block_size": (32,), "scale_dtype": E8M0}),
    "mxfp4": ("float4_e2m1fn, packed, an E8M0 scale for 32 numbers of the last dimension",
        {"dtype": "float4_e2m1fn", "block_size": (32,), "scale_dtype": E8M0, "scale_rule": "even"}),
    "nvfp4": ("float4_e2m1fn, packed, an E4M3 scale for 16 numbers of the last dimension, one for all",
        {"dtype": "float4_e2m1fn", "block_size": (16,), "scale_dtype": E4M3.dtype}),
}  # fmt: skip
#: The schemes of :func:`quantkit.quantize`, and what each is. All take float32 steps.
SCHEMES: Mapping[str, str] = MappingProxyType({name: text for name, (text, _) in _NAMED.items()})
# quantkit.checkpoint's names for the same codes, where they differ: its command names layouts of files.
OF_CHECKPOINTS = {
    "w8a8": "int8_channel", "w8": "int8_channel", "w4": "int4_group128", "fp8": "fp8_token",
    "fp8_block": "fp8_block128",
}  # fmt: skip


def global_limit(scheme: object, keywords: Mapping[str, Any]) -> int | None:
    """What a scheme maps max |x| to by a global scale of its own: NVFP4's two greatest numbers."""
    given = keywords.get("global_scale") is not None
    if scheme != "nvfp4" or given or keywords.get("scale_dtype") is not E4M3.dtype:
        return None
    return E4M3.high * 6


def keywords_of(scheme: object) -> Mapping[str, Any]:
    """The keywords of dynamic_quantize that a scheme stands for, which may be such a mapping itself."""
    if isinstance(scheme, Mapping):
        return scheme
    if not isinstance(scheme, str):
        raise TypeError(f"scheme: expected a str or a mapping, got {type(scheme).__name__}")
    if scheme not in _NAMED:
        own = OF_CHECKPOINTS.get(scheme)
        hint = f", the checkpoint command's name of {own}" if own else ""
        raise ValueError(f"scheme: expected one of {', '.join(_NAMED)}, got {scheme[:40]!r}{hint}")
    return {"compute_dtype": torch.float32, **_NAMED[scheme][1]}
