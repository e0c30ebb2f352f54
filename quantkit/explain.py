"""Which known convention gives these codes: why two quantizers differ (docs/compatibility.md).

A convention is a scale, a quotient, a zero point's place, and a rule beyond the limits. Chosen scales,
rounding and packing are the reference's and the formats'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import _checks, reference
from .formats import HALF_DTYPES, OF_NAME, Float, Format
from .params import QuantizationParams, unpack

_Tensor = torch.Tensor
_Candidates = Iterator[tuple[str, _Tensor]]


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. ``str()`` of it is a few lines of text.

    Attributes:
        ranking: (the convention, how many codes differ, of how many), the fewest first.
    """

    ranking: tuple[tuple[str, int, int], ...]

    def __str__(self) -> str:
        fewest, total = self.ranking[0][1:]
        lines = [f"No known convention gives all {total:,} codes. The closest:"]
        if fewest == 0:
            lines = [f"All {total:,} codes are those of"]
        best = [name for name, differing, _ in self.ranking if differing == fewest]
        others = [entry for entry in self.ranking if entry[1] > fewest][:3]
        count = f": {fewest:,} differ" if fewest else ""
        lines += [f"  {name}{count}{_call(name)}" for name in best]
        lines += [f"  not {name}: {differing:,} differ" for name, differing, _ in others]
        return "\n".join(lines)


_HALF_RANGE = ", scale of half the range"
# How quantkit computes a convention. What is not here no single call gives.
_CALLS = {
    "x / scale": "as it is",
    "x / scale + zero_point, rounded": "compute_dtype=torch.float32",
    "round(x / scale) + zero_point": "round_first=True",
    f"x / scale + zero_point, rounded{_HALF_RANGE}": 'scale_rule="half_range"',
    f"round(x / scale) + zero_point{_HALF_RANGE}": 'scale_rule="half_range", round_first=True',
}


def _call(name: str) -> str:
    return f" [quantkit: {_CALLS[name]}]" if name in _CALLS else ""


def explain(codes: _Tensor, x: _Tensor, qparams: QuantizationParams) -> Explanation:
    """Say which known convention gives these codes, where another quantizer's differ from quantkit's.

    | convention | who takes it |
    |---|---|
    | ``x / scale + zero_point, rounded`` | quantkit, compressed-tensors |
    | ``round(x / scale) + zero_point`` | ONNX, AWQ, GPTQ; quantkit with ``round_first=True`` |
    | ``round(x * (1 / scale)) + zero_point`` | torch.fake_quantize, torchao |
    | ``x * (1 / scale) + zero_point, rounded`` | torch.quantize_per_channel |
    | ``fma(x, 1 / scale, zero_point), rounded`` | FBGEMM: torch.quantize_per_tensor on x86 |
    | ``round half away from zero`` | gguf |
    | ``x * (q_max / max abs x)`` | TransformerEngine, vLLM |
    | ``scale of half the range`` | torch's observers, torchao, compressed-tensors |
    | the same steps in x's half precision | compressed-tensors, optimum-quanto |
    | ``cast without a clip`` (float8) | ml_dtypes, torch before 2.13 |
    | another code of NaN | FBGEMM, ONNX Runtime |

    Args:
        codes: what the other quantizer returned, in the dtype and shape of :func:`quantize_tensor`'s
            codes: those of fewer than 8 bits are packed.
        x: what was quantized, a dense tensor of any real dtype.
        qparams: the other quantizer's scale, zero point and limits.

    Returns:
        An object whose ``str()`` is a text, and whose ``ranking`` is a tuple of (convention, number of
        codes that differ, number of codes), the fewest first. Conventions that x cannot tell apart
        stand side by side. It is meant for debugging: each convention is computed by plain torch.

    Raises:
        TypeError or ValueError that names the argument, its value and what was expected.
        RuntimeError where tensors are on different devices.
    """
    _, _, q_min, q_max, f, _ = unpack("x", x, qparams)
    ours = reference.quantize_tensor(x, qparams)  # says what is wrong with the two
    _checks.tensor("codes", codes, ((ours.dtype,), f"{ours.dtype} for {f.name}"))
    if codes.shape != ours.shape:
        expected = f"shape {tuple(ours.shape)} for x of shape {tuple(x.shape)} and {f.name}"
        raise _checks.wrong(ValueError, "codes", expected, tuple(codes.shape))
    if codes.device != x.device:
        raise _checks.wrong(RuntimeError, "codes", f"device {x.device}, that of x", codes.device)
    given, found = f.unpack(codes.detach()), []
    for name, v in _quotients(x.detach(), qparams, f, q_min, q_max):
        v = v.to(torch.float32)
        encoded = f.encode(v, q_min, q_max)
        variants = {"": encoded}
        if v.isnan().any():
            variants |= _other_nans(f, v, x, encoded, q_min, q_max)
        if isinstance(f, Float) and f.bits == 8:
            variants[", cast without a clip"] = _cast(f, v)
        found += [
            (name + more, _differing(given, c), given.numel()) for more, c in variants.items()
        ]
    return Explanation(tuple(sorted(found, key=lambda entry: entry[1])))


def _differing(a: _Tensor, b: _Tensor) -> int:
    bits = [
        t.contiguous().view(torch.uint8 if t.element_size() == 1 else torch.int16) for t in (a, b)
    ]
    return int((bits[0] != bits[1]).sum())


# ---- scales and quotients ---------------------------------------------------------------------------


def _scale(x: _Tensor, p: QuantizationParams, f: Format) -> _Tensor:
    """The scale of each element: what the reference makes of the code of 1."""
    one = f.pack(f.encode(torch.ones(x.shape, device=x.device), f.low, f.high))
    zero = torch.zeros((), device=x.device)
    p = replace(p, zero_point=zero, compute_dtype=torch.float32, round_first=False)
    return reference.dequantize_tensor(one, p)


def _zero_point(x: _Tensor, p: QuantizationParams, f: Format) -> _Tensor:
    """That of each element: what the reference makes of the code of 0 beside a scale of 1."""
    if not f.has_zero_point:
        return torch.zeros(x.shape, device=x.device)
    shape = p.scale.shape if isinstance(p.scale, _Tensor) else ()
    one = torch.ones(shape, device=x.device)
    p = replace(p, scale=one, global_scale=None, compute_dtype=torch.float32, round_first=False)
    zeros = f.pack(f.encode(torch.zeros(x.shape, device=x.device), f.low, f.high))
    return -reference.dequantize_tensor(zeros, p)


def _blocks(x: _Tensor, p: QuantizationParams) -> Sequence[int] | None:
    """What shares a scale, as block_size; an empty list where shapes of other ranks say it."""
    if p.scale.dim() == 0:
        return None
    if p.block_size is not None:
        return p.block_size
    if p.scale.dim() != x.dim() or x.numel() == 0:
        return []
    return [n // s for n, s in zip(x.shape, p.scale.shape, strict=True)]


def _quotients(x: _Tensor, p: QuantizationParams, f: Format, q_min: int, q_max: int) -> _Candidates:
    """What each convention rounds, by name."""
    p = QuantizationParams(
        p.scale, p.zero_point, q_min, q_max, dtype=f.dtype,
        block_size=getattr(p, "block_size", None), global_scale=getattr(p, "global_scale", None),
    )  # fmt: skip
    if not isinstance(p.scale, _Tensor):
        p.scale = torch.tensor(float(p.scale))
    scale, zero_point = _scale(x, p, f), _zero_point(x, p, f)
    yield from _placed(x.to(torch.float32), scale, zero_point, f, "")
    if x.dtype in HALF_DTYPES:
        in_half = f" in {str(x.dtype).removeprefix('torch.')}"
        yield from _placed(x, scale.to(x.dtype), zero_point.to(x.dtype), f, in_half)
    blocks = _blocks(x, p)
    if f.low >= 0 or x.numel() == 0 or (blocks is not None and len(blocks) != x.dim()):
        return
    x = x.to(torch.float32)
    options: dict[str, Any] = {"block_size": blocks, "eps": 2.0**-126}
    options["compute_dtype"] = torch.float32
    # A scale of max |x| / 1.
    largest = reference.get_symmetric_qparams(x, dtype="int8", q_min=-1, q_max=1, **options)
    product = x * (q_max / _scale(x, largest, OF_NAME["int8"]))
    placed = torch.round(product) + zero_point if f.has_zero_point else product
    yield "x * (q_max / max abs x)", placed
    if f.has_zero_point:
        options |= {"dtype": f.name, "q_min": q_min, "q_max": q_max, "scale_rule": "half_range"}
        half = reference.get_symmetric_qparams(x, **options)
        yield from _placed(x, _scale(x, half, f), zero_point, f, _HALF_RANGE)


def _placed(x: _Tensor, scale: _Tensor, zero_point: _Tensor, f: Format, where: str) -> _Candidates:
    """Quotients of one scale and one dtype."""
    quotient, product = x / scale, x * (1.0 / scale)
    if not f.has_zero_point:
        yield f"x / scale{where}", quotient
        yield f"x * (1 / scale){where}", product
        return
    yield f"x / scale + zero_point, rounded{where}", quotient + zero_point
    yield f"round(x / scale) + zero_point{where}", torch.round(quotient) + zero_point
    yield f"round(x * (1 / scale)) + zero_point{where}", torch.round(product) + zero_point
    yield f"x * (1 / scale) + zero_point, rounded{where}", product + zero_point
    if x.dtype == torch.float32:  # the product of two is exact in float64
        exact = x.double() * (1.0 / scale).double()
        yield f"fma(x, 1 / scale, zero_point), rounded{where}", exact + zero_point
    down = quotient.abs().floor()
    away = torch.copysign(down + (2 * (quotient.abs() - down)).floor(), quotient)
    yield f"round half away from zero{where}", away + zero_point


# ---- rules beyond numbers and limits ----------------------------------------------------------------


def _other_nans(
    f: Format, v: _Tensor, x: _Tensor, codes: _Tensor, q_min: int, q_max: int
) -> dict[str, _Tensor]:
    """Codes with another code of NaN."""
    if isinstance(f, Float):
        bits = codes.view(torch.uint8)
        sign = 2 ** (f.bits - 1)
        signed = torch.where(v.isnan() & x.signbit(), bits | sign, bits)
        return {", sign of NaN kept": signed.view(codes.dtype)}
    limits = {"q_min": q_min, "q_max": q_max}
    return {
        f", NaN becomes {name}": f.encode(v.nan_to_num(limit, torch.inf, -torch.inf), q_min, q_max)
        for name, limit in limits.items()
    }


def _cast(f: Float, v: _Tensor) -> _Tensor:
    """The codes of a cast without a clip: beyond the last number is what comes after its code."""
    codes = f.encode(v, f.low, f.high).view(torch.uint8)
    top = torch.tensor([f.beyond - 2, f.beyond - 1], dtype=torch.uint8, device=v.device)
    below, last = f.decode(top.view(f.storage))
    edge = last + (last - below) / 2
    over = (v.abs() >= edge) if f.beyond % 2 == 0 else (v.abs() > edge)
    beyond = f.beyond | (v.signbit().to(torch.uint8) << (f.bits - 1))
    return torch.where(over, beyond, codes).view(f.storage)
