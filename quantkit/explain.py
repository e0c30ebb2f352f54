"""Which known convention gives these codes: why two quantizers differ (docs/compatibility.md).

A convention is a scale, a quotient, a zero point's place, and a rule beyond the limits. Codes are made
and packed by the formats, parameters repeated by the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import _checks, _torch, reference
from .formats import FLOAT_DTYPES, HALF_DTYPES, Float, Format
from .params import QuantizationParams, unpack
from .steps import Float32Steps, expand

_Tensor = torch.Tensor
_Candidates = Iterator[tuple[str, _Tensor]]

_HALF_RANGE = ", scale of half the range"
# Who takes a convention, and the call or option by which quantkit does.
_NOTES = {
    "quantkit, as called": "quantize_tensor(x, qparams)",
    "x / scale": "torchao, compressed-tensors, ONNX, DeepSeek",
    "x / scale, cast without a clip": "ml_dtypes, torch before 2.13",
    "x * (1 / scale)": "DeepGEMM, vLLM",
    "x * (q_max / max abs x)": "TransformerEngine, vLLM",
    "x / scale + zero_point, rounded": "compressed-tensors; quantkit: compute_dtype=torch.float32",
    "round(x / scale) + zero_point": "ONNX, vLLM, AWQ; quantkit: round_first=True",
    "round(x * (1 / scale)) + zero_point": "torch.fake_quantize, torchao",
    "x * (1 / scale) + zero_point, rounded": "torch.quantize_per_channel",
    "fma(x, 1 / scale, zero_point), rounded": "FBGEMM, torch.quantize_per_tensor on x86",
    "round half away from zero": "gguf",
    "x / scale + zero_point, rounded in x's dtype": "compressed-tensors, optimum-quanto",
    f"x / scale + zero_point, rounded{_HALF_RANGE}":
        'compressed-tensors; quantkit: scale_rule="half_range"',
    f"round(x / scale) + zero_point{_HALF_RANGE}":
        'GPTQ; quantkit: scale_rule="half_range", round_first=True',
    f"round(x * (1 / scale)) + zero_point{_HALF_RANGE}": "torch's observers, torchao",
    "round(x / scale) + zero_point, NaN becomes q_min":
        "ONNX Runtime on x86; quantkit: round_first=True, but NaN becomes 0",
    "round(x * (1 / scale)) + zero_point, NaN becomes q_min": "torch.fake_quantize on x86",
    "fma(x, 1 / scale, zero_point), rounded, NaN becomes q_max":
        "torch.quantize_per_tensor on x86 with AVX-512",
    "x / scale, sign of NaN kept": "torchao, compressed-tensors, ONNX",
}  # fmt: skip


def _note(name: str) -> str:
    """The convention and its note. Of others with another code of NaN: the call that gives the rest."""
    note = _NOTES.get(name, "")
    base, of_nan, _ = name.partition(", NaN becomes ")
    if of_nan and not note:
        _, ours, call = _NOTES.get(base, "").partition("quantkit: ")
        note = f"{ours}{call}, but NaN becomes 0" if ours else ""
    return f"{name} [{note}]" if note else name


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. ``str()`` of it is a few lines of text.

    Attributes:
        ranking: (the convention, how many codes differ, of how many), the fewest first.
    """

    ranking: tuple[tuple[str, int, int], ...]

    def __str__(self) -> str:
        """The best with who takes them, then the next three counts; a hint where none fits."""
        groups: dict[int, list[str]] = {}
        for name, differing, _ in self.ranking:
            groups.setdefault(differing, []).append(name)
        fewest, total = self.ranking[0][1:]
        lines = [f"All {total:,} codes are those of"]
        if fewest:
            lines = [f"No known convention gives all {total:,} codes. Where {fewest:,} differ:"]
        best = groups.pop(fewest)
        lines += [f"  {_note(n)}" for n in best[:4]]
        lines += [f"  and {len(best) - 4} more"] if len(best) > 4 else []
        for differing, (name, *more) in list(groups.items())[:3]:
            others = f" and {len(more)} more" if more else ""
            lines.append(f"  not {name}{others}: {differing:,} differ")
        lines += ["  check scale and zero_point"] if fewest else []
        return "\n".join(lines)


def explain(codes: _Tensor, x: _Tensor, qparams: QuantizationParams) -> Explanation:
    """Say which known convention gives these codes, where another quantizer's differ from quantkit's.

    The first candidate is quantkit itself. The others are quotients, places of the zero point, steps in
    x's dtype, scales of half the range, casts without a clip and codes of NaN, as libraries take them.

    Args:
        codes: what the other quantizer returned, in the dtype and shape of :func:`quantize_tensor`'s
            codes: those of fewer than 8 bits are packed. float4_e2m1fn also torch.float4_e2m1fn_x2.
            Of torch.qint8 pass ``codes.int_repr()``, of numpy ``torch.from_numpy(codes)``.
        x: what was quantized, a dense tensor of any real dtype.
        qparams: the other quantizer's scale, zero point and limits.

    Returns:
        An object whose ``str()`` is a text, and whose ``ranking`` is a tuple of (convention, number of
        codes that differ, number of codes), the fewest first. Conventions that x cannot tell apart
        stand side by side. It is meant for debugging: each convention is computed by plain torch.

    Raises:
        TypeError or ValueError that names the argument, its value and what was expected.
        RuntimeError where tensors are on different devices, or are DTensors.

    docs/compatibility.md says who takes which convention.
    """
    _torch.no_dtensors("explain", codes, x, getattr(qparams, "scale", None))
    _no_array("x", x)
    ours = reference.quantize_tensor(x, qparams)  # says what is wrong with the two
    f = unpack("x", x, qparams)[4]
    _check_codes(codes, f)
    if codes.shape != ours.shape:
        expected = f"shape {tuple(ours.shape)} for x of shape {tuple(x.shape)} and {f.name}"
        raise _checks.wrong(ValueError, "codes", expected, tuple(codes.shape))
    if codes.device != x.device:
        raise _checks.wrong(RuntimeError, "codes", f"device {x.device}, that of x", codes.device)
    given, quantkit = (f.unpack(t.detach().view(f.storage)) for t in (codes, ours))
    found = [("quantkit, as called", _differing(given, quantkit), given.numel())]
    for name, c in _candidates(x.detach(), qparams):
        found.append((name, _differing(given, c), given.numel()))
    return Explanation(tuple(sorted(found, key=lambda entry: entry[1])))


def _no_array(name: str, value: object) -> None:
    if type(value).__module__ == "numpy":  # without an import of it
        expected = f"a torch.Tensor, such as torch.from_numpy({name})"
        raise _checks.wrong(TypeError, name, expected, type(value).__name__)


def _check_codes(codes: object, f: Format) -> None:
    """In the dtype of the format's codes; errors name the way there from what others return."""
    _no_array("codes", codes)
    if isinstance(codes, _Tensor):
        expected = f"{f.storage} for {f.name}"
        if codes.is_quantized:
            expected += ", such as codes.int_repr()"
            raise _checks.wrong(TypeError, "codes", expected, codes.dtype)
        if codes.dtype in FLOAT_DTYPES:
            expected += ": codes, not floats"
            raise _checks.wrong(TypeError, "codes", expected, codes.dtype)
    _checks.codes("codes", codes, f)


def _differing(a: _Tensor, b: _Tensor) -> int:
    kind = torch.uint8 if a.element_size() == 1 else torch.int16
    return int((a.contiguous().view(kind) != b.contiguous().view(kind)).sum())


def _candidates(x: _Tensor, p: QuantizationParams) -> _Candidates:
    """The codes of each convention, by name."""
    scale, zero_point, q_min, q_max, f, options = unpack("x", x, p, float32=True)
    assert options is not None  # of float32 steps there are some
    blocks, whole = options["block_size"], options["global_scale"]
    steps = Float32Steps(x.device, x.shape, scale, zero_point, blocks, whole)
    # Which scale each element has: what shares one has a maximum.
    index = torch.arange(scale.numel(), device=x.device).view(scale.shape)
    index = expand(index, x.shape, blocks).expand(x.shape).flatten()
    largest = torch.zeros(scale.numel(), device=x.device)
    largest = largest.scatter_reduce(0, index, x.to(torch.float32).abs().flatten(), "amax")
    for name, v in _quotients(x, steps, largest[index].view(x.shape), f, q_min, q_max):
        v = v.to(torch.float32)
        codes = f.encode(v, q_min, q_max)
        yield name, codes
        if v.isnan().any():
            for more, c in _other_nans(f, v, x, codes, q_min, q_max):
                yield name + more, c
        if isinstance(f, Float) and f.bits == 8:
            yield f"{name}, cast without a clip", _cast(f, v)


# ---- quotients --------------------------------------------------------------------------------------


def _quotients(
    x: _Tensor, steps: Float32Steps, largest: _Tensor, f: Format, q_min: int, q_max: int
) -> _Candidates:
    """What each convention rounds, by name. largest: max |x| of what shares a scale."""
    scale, zero_point = steps.scale, steps.zero_point
    if zero_point is None:
        zero_point = torch.zeros((), device=x.device)
    yield from _placed(x.to(torch.float32), scale, zero_point, f, "")
    if x.dtype in HALF_DTYPES:
        yield from _placed(x, scale.to(x.dtype), zero_point.to(x.dtype), f, " in x's dtype")
    if f.low >= 0:
        return
    x = x.to(torch.float32)
    product = x * (q_max / largest.clamp(min=2.0**-126))
    yield (
        "x * (q_max / max abs x)",
        torch.round(product) + zero_point if f.has_zero_point else product,
    )
    if f.has_zero_point:
        half = torch.full((), max(q_max - q_min, 1) / 2, device=x.device)
        yield from _placed(x, (largest / half).clamp(min=2.0**-126), zero_point, f, _HALF_RANGE)


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
) -> _Candidates:
    """Codes with another code of NaN."""
    if isinstance(f, Float):
        bits = codes.view(torch.uint8)
        signed = torch.where(v.isnan() & x.signbit(), bits | 2 ** (f.bits - 1), bits)
        yield ", sign of NaN kept", signed.view(codes.dtype)
        return
    for name, limit in (("q_min", q_min), ("q_max", q_max)):
        numbers = v.nan_to_num(limit, torch.inf, -torch.inf)
        yield f", NaN becomes {name}", f.encode(numbers, q_min, q_max)


def _cast(f: Float, v: _Tensor) -> _Tensor:
    """The codes of a cast without a clip: beyond the last number is what comes after its code."""
    codes = f.encode(v, f.low, f.high).view(torch.uint8)
    top = torch.tensor([f.beyond - 2, f.beyond - 1], dtype=torch.uint8, device=v.device)
    below, last = f.decode(top.view(f.storage))
    edge = last + (last - below) / 2
    over = (v.abs() >= edge) if f.beyond % 2 == 0 else (v.abs() > edge)
    beyond = f.beyond | (v.signbit().to(torch.uint8) << (f.bits - 1))
    return torch.where(over, beyond, codes).view(f.storage)
