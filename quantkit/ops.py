"""The public functions, written once over operators: torch.ops.quantkit's, opaque to compilers, here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import _checks
from .formats import WIDEST, Format
from .params import (
    QuantizationParams,
    as_seed,
    as_tensor,
    choice,
    granularity,
    is_version_1,
    kept,
    unpack,
)
from .schemes import global_limit, keywords_of
from .sums import Measured


@dataclass
class Operators:
    """Operators with two overloads, version 1's and ``.format``, as the functions call them.

    Each raises the contract's exact errors.
    """

    choose_qparams: Callable[..., Any]
    quantize: Callable[..., Any]
    dequantize: Callable[..., Any]
    dynamic_quantize: Callable[..., Any]
    quantize_dequantize: Callable[..., Any]
    fake_quantize: Callable[..., Any]


@dataclass
class SingleOperators:
    """The same of operators that have one overload."""

    aminmax: Callable[..., Any]
    measure: Callable[..., Any]
    measure_limbs: Callable[..., Any]
    linear_w8a8: Callable[..., Any]


# Operators, from _load, which registers them; quantkit.reference has its own.
operators: Any = None  # version 1's overloads
format_operators: Any = None  # the .format overloads
single_operators: Any = None


def get_symmetric_qparams(
    x: torch.Tensor,
    per_channel: bool = False,
    channel_dim: int = 0,
    dtype: torch.dtype | str = torch.int8,
    eps: float | None = None,
    *,
    block_size: Sequence[int] | None = None,
    q_min: int | None = None,
    q_max: int | None = None,
    scale_dtype: torch.dtype | None = None,
    scale_rule: str | None = None,
    global_scale: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    round_first: bool = False,
) -> QuantizationParams:
    """Choose a scale that maps max |x| to q_max. The zero point is 0.

    ``scale = max(max |x| / max(q_max, 1), eps)``. For int8, uint8 and int16 each step is rounded to x's
    dtype. Integer x, and half precision with limits outside [-128, 255], become float32 first.
    ``compute_dtype=torch.float32`` asks for float32 steps, which all other formats take.

    | granularity | arguments | scale.shape for x of shape (R, C) |
    |---|---|---|
    | tensor | none | ``()`` |
    | channel (row) | ``per_channel=True`` | ``(R, 1)`` |
    | channel (column) | ``per_channel=True, channel_dim=1`` | ``(1, C)`` |
    | token | ``block_size=[1, -1]`` | ``(R, 1)`` |
    | group of 128 | ``block_size=[1, 128]`` | ``(R, C / 128)`` |
    | block of 128 × 128 | ``block_size=[128, 128]`` | ``(R / 128, C / 128)`` |

    Float32 steps take a short last block: the quotient is rounded up. Version 1's steps do not.

    | scale_rule | scale | formats |
    |---|---|---|
    | None | max abs(x) / q_max | all |
    | "half_range" | max abs(x) / ((q_max - q_min) / 2) | signed integers |
    | "ceil" | the least power of two not below max abs(x) / q_max | all |
    | "floor" | max abs(x) and q_max, each rounded down to a power of two, divided | all |
    | "even" | as "floor", of max abs(x) rounded to the format's mantissa | float |

    Args:
        x: a dense tensor of any real dtype and any strides. It needs an element for each scale.
        per_channel: whether each index of ``channel_dim`` gets a scale of its own. A vector is one
            channel with a scale of shape ``(1,)``.
        channel_dim: the dimension of the channels. A negative one counts from the end.
        dtype: the format of the codes, as a dtype or its name: int8, uint8, int16, uint16, int4, uint4,
            int2, uint2, float8_e4m3fn, float8_e5m2 or float4_e2m1fn.
        eps: the smallest scale, above 0. None is 1e-8 for integer formats with float32 scales, else the
            smallest normal number of scale's dtype. Values far below eps become 0: pass a smaller eps
            for them.
        block_size: one int for each dimension of x; -1 stands for the whole dimension.
        q_min, q_max: limits within those of dtype, such as -127 and 127. Of a float format q_max is an
            integer that it has, and q_min the negative.
        scale_dtype: None or torch.float32. torch.float8_e8m0fnu makes powers of two, and
            torch.float8_e4m3fn rounds the scale to that format: codes of one byte.
        scale_rule: None, or a name of the table. E8M0 scales take the powers of two; None is "ceil".
        global_scale: a number, or a tensor without dimensions or of scale's rank, each size dividing
            scale's. The chosen scale is divided by it, and every step multiplies by it. Powers of two
            take none.
        compute_dtype: torch.float32 asks for float32 steps, which cost bfloat16 x no accuracy.
        round_first: kept for :func:`quantize_tensor`, which then adds the zero point after rounding.

    Returns:
        QuantizationParams with contiguous scale and zero_point. Both are 0-dim for a whole tensor.
        Float32 steps give float32 scales, or coded ones. The zero point of a float format is a 0-dim 0.

    Raises:
        TypeError, ValueError or IndexError that names the argument, its value and what was expected.

    Warning:
        ``dtype=torch.uint8`` has no negative codes, so the symmetric scheme turns negative x into 0.
        Use :func:`get_asymmetric_qparams` there.

        In float16 the default eps rounds to 0, and an all-zero x gets scale 0: pass ``eps=1e-7``.

        bfloat16 rounds every step, which costs about 0.6 dB of SQNR: pass
        ``compute_dtype=torch.float32``.

    docs/numerics.md has the formula, docs/options.md helps to choose.
    """
    f, blocks, q_min, q_max, eps, _, _ = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, True, False,
        scale_dtype, scale_rule,
    )  # fmt: skip
    if is_version_1(f, compute_dtype, round_first, scale_dtype, scale_rule, global_scale):
        scale, zero_point = operators.choose_qparams(x, blocks, q_min, q_max, eps, True)
        blocks = kept(x, blocks)
        return QuantizationParams(scale, zero_point, q_min, q_max, dtype=f.dtype, block_size=blocks)
    _checks.rounding(f, round_first)
    global_scale = as_tensor("global_scale", global_scale)
    parameters = format_operators.choose_qparams(
        x, blocks, q_min, q_max, eps, True, f.name,
        scale_dtype=scale_dtype, scale_rule=scale_rule, global_scale=global_scale,
    )  # fmt: skip
    return _parameters(x, blocks, f, q_min, q_max, parameters, round_first, global_scale)


def get_asymmetric_qparams(
    x: torch.Tensor,
    per_channel: bool = False,
    channel_dim: int = 0,
    dtype: torch.dtype | str = torch.int8,
    eps: float | None = None,
    *,
    block_size: Sequence[int] | None = None,
    q_min: int | None = None,
    q_max: int | None = None,
    include_zero: bool = False,
    compute_dtype: torch.dtype | None = None,
    round_first: bool = False,
) -> QuantizationParams:
    """Choose a scale and a zero point that map [min x, max x] to [q_min, q_max].

    ``scale = max((x_max - x_min) / max(q_max - q_min, 1), eps)``;
    ``zero_point = clip(q_min - round(x_min / scale), q_min, q_max)``, a float of scale's dtype.

    Args:
        dtype: an integer format; float formats have no zero point.
        include_zero: extend [min x, max x] to hold 0, so that 0 is exact and data of one sign works.
        The other arguments, granularities, results and errors: :func:`get_symmetric_qparams`.

    Warning:
        Pass ``include_zero=True`` unless each block of x has values on both sides of 0. Without it the
        zero point is clipped, and data of one sign collapses. A LayerNorm weight comes back with an
        SQNR of 6.5 dB, with ``include_zero=True`` of 57 dB.

        In float16 the default eps rounds to 0, and an all-zero row becomes NaN: pass ``eps=1e-7``.

        In float16 a range max x - min x above 65504 overflows, and the block becomes NaN: pass
        ``x.float()``.

        bfloat16 rounds every step, which costs about 0.6 dB of SQNR: pass
        ``compute_dtype=torch.float32``.

    docs/numerics.md has the formula, docs/options.md helps to choose.
    """
    f, blocks, q_min, q_max, eps, _, include_zero = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, False, include_zero
    )
    if is_version_1(f, compute_dtype, round_first):
        scale, zero_point = operators.choose_qparams(
            x, blocks, q_min, q_max, eps, False, include_zero
        )
        blocks = kept(x, blocks)
        return QuantizationParams(scale, zero_point, q_min, q_max, dtype=f.dtype, block_size=blocks)
    _checks.rounding(f, round_first)
    parameters = format_operators.choose_qparams(
        x, blocks, q_min, q_max, eps, False, f.name, include_zero=include_zero
    )
    return _parameters(x, blocks, f, q_min, q_max, parameters, round_first)


def quantize_tensor(
    x: torch.Tensor,
    qparams: QuantizationParams,
    *,
    seed: int | tuple[int, int] | torch.Tensor | None = None,
    index: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the codes ``clip(round(x / scale + zero_point), q_min, q_max)``, half to even, NaN to 0.

    Args:
        x: a dense tensor of any real dtype and any strides.
        qparams: scale and zero_point of a shape that fits x (see QuantizationParams), or of lower rank
            and broadcasting to x's shape.
        seed: asks for stochastic rounding, which is right on average: an int, a pair (seed, stream), or
            an int64 tensor of both, on the CPU or x's device. Inside torch.compile and export pass a
            tensor: an int becomes a constant. It asks for float32 steps. The random numbers come from
            Philox, which is no cryptographic generator.
        index: 1 + rank ints: the place of x's first element in the sequence of random numbers, and how
            far the next one of each dimension is. :func:`shard_index` makes those of a part of a tensor.
            None: x is a whole tensor. Needs a seed.

    Returns:
        Codes of x's shape in ``qparams.dtype`` with the strides of ``torch.empty_like(x)``. Those of
        fewer than 8 bits are contiguous uint8, two or four codes a byte along the last dimension, whose
        size is divided by as many. The first is in the lowest bits.

    Raises:
        TypeError or ValueError that names the argument, its value and what was expected.
        RuntimeError where tensors are on different devices.

    Note:
        The zero point is added before rounding. ONNX and ``torch.fake_quantize_per_tensor_affine`` add
        it after, so codes at ties differ where the zero point is odd: ``round_first`` does as they do.

        Float formats clip first, then round to a number of the format. NaN becomes the code of NaN.

    docs/numerics.md has the formula.
    """
    scale, zero_point, q_min, q_max, f, options = unpack(
        "x", x, qparams, seed is not None or index is not None
    )
    if options is None:
        return operators.quantize(x, scale, zero_point, q_min, q_max, f.number)
    options |= _drawn_from(seed, index)
    return format_operators.quantize(x, scale, zero_point, q_min, q_max, f.name, **options)


def _drawn_from(seed: Any, index: Any) -> dict[str, Any]:
    """seed and index as the operators take them."""
    return {"seed": as_seed(seed), "index": _checks.block_sizes(index, "index")}


def dequantize_tensor(
    q: torch.Tensor, qparams: QuantizationParams, *, output_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return ``(float32(q) - zero_point) * scale``.

    Args:
        q: codes of any real dtype; int8, uint8 and int16 are fast. Codes in a floating dtype are taken
            as numbers: 1.5 is the code 1.5. Packed formats take uint8, float8 formats their own dtype,
            float4_e2m1fn also torch.float4_e2m1fn_x2.
        qparams: as for :func:`quantize_tensor`. The limits are not used.
        output_dtype: torch.float16, torch.bfloat16 or torch.float32: the float32 result is cast once. It
            asks for float32 steps.

    Returns:
        float32, or output_dtype, of q's shape; of packed formats the last size is that of the codes.
        Version 1's steps give float64 where scale or zero_point is a float64 tensor with dimensions.

    Raises:
        The errors of :func:`quantize_tensor`.

    docs/numerics.md has the formula.
    """
    scale, zero_point, _, _, f, options = unpack("q", q, qparams, output_dtype is not None)
    if options is None:
        return operators.dequantize(q, scale, zero_point)
    del options["round_first"]
    return format_operators.dequantize(
        q, scale, zero_point, f.name, **options, output_dtype=output_dtype
    )


def quantize_dequant(
    x: torch.Tensor,
    per_channel: bool = False,
    channel_dim: int = 0,
    dtype: torch.dtype | str = torch.int8,
    sym: bool = True,
    *,
    block_size: Sequence[int] | None = None,
    q_min: int | None = None,
    q_max: int | None = None,
    include_zero: bool = False,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    scale_rule: str | None = None,
    global_scale: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    round_first: bool = False,
    seed: int | tuple[int, int] | torch.Tensor | None = None,
    index: Sequence[int] | None = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, QuantizationParams]:
    """Choose parameters, quantize and dequantize in one call: ``(q, x_hat, qparams)``.

    The bits are those of three calls: :func:`get_symmetric_qparams` (with ``sym=False``
    :func:`get_asymmetric_qparams`), :func:`quantize_tensor` and :func:`dequantize_tensor`.

    Args:
        sym: False takes the asymmetric scheme. Pass ``include_zero=True`` with it, unless each block of x
            has values on both sides of 0.
        output_dtype: of x_hat, as in :func:`dequantize_tensor`. It asks for float32 steps.
        seed, index: stochastic rounding, as in :func:`quantize_tensor`. Scales are those
            of float32 steps: draws do not touch them.
        The other arguments, results, errors and warnings: those of the three functions.
    """
    f, blocks, q_min, q_max, eps, sym, include_zero = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, sym, include_zero,
        scale_dtype, scale_rule,
    )  # fmt: skip
    if is_version_1(
        f, compute_dtype, round_first, scale_dtype, scale_rule, global_scale, output_dtype, seed,
        index,
    ):  # fmt: skip
        q, x_hat, scale, zero_point = operators.quantize_dequantize(
            x, blocks, q_min, q_max, eps, sym, f.number, include_zero
        )
        blocks = kept(x, blocks)
        return q, x_hat, QuantizationParams(
            scale, zero_point, q_min, q_max, dtype=f.dtype, block_size=blocks
        )  # fmt: skip
    global_scale = as_tensor("global_scale", global_scale)
    q, x_hat, *parameters = format_operators.quantize_dequantize(
        x, blocks, q_min, q_max, eps, sym, f.name, include_zero=include_zero,
        scale_dtype=scale_dtype, scale_rule=scale_rule, global_scale=global_scale,
        round_first=round_first, output_dtype=output_dtype, **_drawn_from(seed, index),
    )  # fmt: skip
    made = _parameters(x, blocks, f, q_min, q_max, parameters, round_first, global_scale)
    return q, x_hat, made


def dynamic_quantize(
    x: torch.Tensor,
    per_channel: bool = False,
    channel_dim: int = 0,
    dtype: torch.dtype | str = torch.int8,
    sym: bool = True,
    *,
    block_size: Sequence[int] | None = None,
    q_min: int | None = None,
    q_max: int | None = None,
    include_zero: bool = False,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    scale_rule: str | None = None,
    global_scale: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    round_first: bool = False,
    seed: int | tuple[int, int] | torch.Tensor | None = None,
    index: Sequence[int] | None = None,
) -> tuple[torch.Tensor, QuantizationParams]:
    """Choose parameters and quantize in one call: ``(q, qparams)``.

    The bits are those of two calls: :func:`get_symmetric_qparams` (with ``sym=False``
    :func:`get_asymmetric_qparams`), then :func:`quantize_tensor`.

    Args:
        x: a dense tensor of any real dtype and any strides. It needs an element for each scale. Packed
            formats need a last size that fills whole bytes.
        per_channel, channel_dim, block_size: the granularity, as in :func:`get_symmetric_qparams`.
        dtype: the format of the codes, as a dtype or its name.
        sym: False takes the asymmetric scheme, which is for integer formats. Pass ``include_zero=True``
            with it, unless each block of x has values on both sides of 0.
        q_min, q_max, eps, scale_dtype, scale_rule, global_scale: as in :func:`get_symmetric_qparams`.
        include_zero: as in :func:`get_asymmetric_qparams`; an error beside ``sym=True``.
        compute_dtype: torch.float32 asks for float32 steps.
        round_first: add the zero point after rounding. It asks for float32 steps.
        seed, index: stochastic rounding, as in :func:`quantize_tensor`. Scales are those
            of float32 steps: draws do not touch them.

    Returns:
        q has codes of x's shape in dtype, with the strides of ``torch.empty_like(x)``. Those of fewer
        than 8 bits are contiguous uint8, two or four codes a byte along the last dimension, whose size
        is divided by as many.

        qparams has contiguous scale and zero_point: 0-dim for a whole tensor, else of x's rank with an
        element for each block. Their dtype is float32 after float32 steps, for integer x, and for half
        precision with limits outside [-128, 255]. Otherwise it is x's. A coded scale has scale_dtype. The
        zero point of a float format is a 0-dim 0.

    Raises:
        TypeError, ValueError or IndexError that names the argument, its value and what was expected.

    The warnings of :func:`get_symmetric_qparams` and :func:`get_asymmetric_qparams` hold here, too.
    """
    f, blocks, q_min, q_max, eps, sym, include_zero = choice(
        x, per_channel, channel_dim, block_size, dtype, q_min, q_max, eps, sym, include_zero,
        scale_dtype, scale_rule,
    )  # fmt: skip
    if is_version_1(
        f, compute_dtype, round_first, scale_dtype, scale_rule, global_scale, seed, index
    ):
        q, scale, zero_point = operators.dynamic_quantize(
            x, blocks, q_min, q_max, eps, sym, f.number, include_zero
        )
        blocks = kept(x, blocks)
        return q, QuantizationParams(
            scale, zero_point, q_min, q_max, dtype=f.dtype, block_size=blocks
        )
    global_scale = as_tensor("global_scale", global_scale)
    q, *parameters = format_operators.dynamic_quantize(
        x, blocks, q_min, q_max, eps, sym, f.name, include_zero=include_zero,
        scale_dtype=scale_dtype, scale_rule=scale_rule, global_scale=global_scale,
        round_first=round_first, **_drawn_from(seed, index),
    )  # fmt: skip
    return q, _parameters(x, blocks, f, q_min, q_max, parameters, round_first, global_scale)


_KEYWORDS = tuple(n for n in dynamic_quantize.__annotations__ if n not in ("x", "return"))


def fake_quantize(
    x: torch.Tensor,
    qparams: QuantizationParams,
    *,
    seed: int | tuple[int, int] | torch.Tensor | None = None,
    index: Sequence[int] | None = None,
) -> torch.Tensor:
    """Quantize and dequantize in x's dtype, with the straight-through gradient.

    The values are those of ``dequantize_tensor(quantize_tensor(x, qparams), qparams)``, cast to x's dtype
    (float32 for integer x). No tensor of codes is made. The gradient of x is the incoming one where
    ``q_min <= round(x / scale + zero_point) <= q_max``; float formats and a seed do not round there, and
    ``qparams.round_first`` rounds before it adds. It is 0 elsewhere and at NaN. For it autograd keeps a
    mask of one byte an element.

    scale and zero_point have gradients where they require one. They are those of learned step size
    quantization (Esser et al., 2020) without its factor: exact sums, rounded once to the parameter's
    dtype. For them autograd keeps x and the parameters. They have no forward mode and no gradient of
    their own.
    Coded scales and global_scale have none: a ValueError where they require grad.

    Arguments and errors are those of :func:`quantize_tensor`.
    """
    scale, zero_point, q_min, q_max, f, options = unpack(
        "x", x, qparams, seed is not None or index is not None
    )
    if options is None:
        return operators.fake_quantize(x, scale, zero_point, q_min, q_max)
    options |= _drawn_from(seed, index)
    return format_operators.fake_quantize(x, scale, zero_point, q_min, q_max, f.name, **options)


def aminmax(
    x: torch.Tensor,
    per_channel: bool = False,
    channel_dim: int = 0,
    *,
    block_size: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the minimum and the maximum of each block: what parameters are chosen from.

    Extremes merge: those of parts, side by side in one tensor, have the extremes of the whole. Parameters
    that are chosen from [min, max] of a block have the bits of those that are chosen from the block.

    Args:
        x: a dense tensor of any real dtype and any strides. It needs an element for each block.
        per_channel, channel_dim, block_size: the granularity, as in :func:`get_symmetric_qparams`. A last
            block may be short.

    Returns:
        Two contiguous tensors of x's dtype, without a gradient. They are 0-dim for a whole tensor, else
        of x's rank with an element for each block. A NaN in a block makes both NaN. -0.0 is below 0.0.

    Raises:
        TypeError, ValueError or IndexError that names the argument, its value and what was expected.
    """
    return single_operators.aminmax(x, granularity(x, per_channel, channel_dim, block_size))


def quantize(
    x: torch.Tensor, scheme: str | Mapping[str, Any], **options: Any
) -> tuple[torch.Tensor, QuantizationParams]:
    """Quantize by a named scheme: ``(q, qparams)``.

    Args:
        x: a dense tensor of any real dtype and any strides. Blocks of more dimensions than x has are an
            error; the other dimensions of x, in front of theirs, get a scale for each index.
        scheme: a name of :data:`quantkit.SCHEMES`, all of which take float32 steps. Or a mapping of
            :func:`dynamic_quantize`'s keywords, whose ``block_size`` may be shorter than x's rank, but
            not empty.
        options: keywords of :func:`dynamic_quantize` that override those of the scheme. "nvfp4" chooses a
            global_scale from the whole of x first, unless one is given.

    Returns, raises: as :func:`dynamic_quantize`. An unknown name is a ValueError, an unknown keyword a
    TypeError.
    """
    named = keywords_of(scheme)
    _checks.keywords("scheme", named, _KEYWORDS)
    _checks.keywords("options", options, _KEYWORDS)
    keywords = {**named, **options}
    blocks = _checks.block_sizes(keywords.get("block_size"))
    if blocks is not None:
        if options:
            channels = keywords.get("per_channel", False)
            _checks.one_granularity(scheme, options, blocks, channels)
        _checks.tensor("x", x)
        if not blocks and x.dim() > 0:
            sizes = f"at least one size for x of shape {tuple(x.shape)}"
            raise _checks.wrong(ValueError, "block_size", sizes, "[]")
        if isinstance(scheme, str) and x.dim() < len(blocks) and "block_size" not in options:
            rank = f"x of at least {len(blocks)} dimensions for {scheme}"
            raise _checks.wrong(ValueError, "scheme", rank, f"shape {tuple(x.shape)}")
        keywords["block_size"] = [*[1] * (x.dim() - len(blocks)), *blocks]
    limit = global_limit(scheme, keywords)
    if limit is not None:
        keywords["global_scale"] = _global_scale(x, limit)
    return dynamic_quantize(x, **keywords)


def _global_scale(x: torch.Tensor, limit: int) -> torch.Tensor:
    """The scale that maps max |x| to limit: of x without elements the smallest."""
    _checks.tensor("x", x)
    if x.numel() == 0:
        return torch.full((), 2.0**-126, dtype=torch.float32, device=x.device)
    chosen = get_symmetric_qparams(
        x, dtype=WIDEST.dtype, q_min=-limit, q_max=limit, eps=2.0**-126,
        compute_dtype=torch.float32,
    )  # fmt: skip
    return chosen.scale


def dequantize(
    q: torch.Tensor, qparams: QuantizationParams, *, output_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return what codes stand for: :func:`dequantize_tensor` by a shorter name."""
    return dequantize_tensor(q, qparams, output_dtype=output_dtype)


def measure(
    x: torch.Tensor, qparams: QuantizationParams, *, over: Sequence[int] | None = None
) -> Measured:
    """Measure the error of quantizing x: exact sums, the same bits on every machine.

    With ``x_hat = dequantize_tensor(quantize_tensor(x, qparams), qparams)``, in float32, it sums x² and
    (x_hat - x)² without rounding and rounds each sum once. No tensor of codes or of x_hat is made.

    Args:
        x: a dense tensor of any real dtype and any strides.
        qparams: as for :func:`quantize_tensor`, with float32 steps. Where it takes others, for float16,
            bfloat16 or float64, pass ``compute_dtype=torch.float32`` to what chooses the parameters.
        over: what is measured together, in the form of ``block_size``; None is the whole of x. It is
            meant for few blocks, such as a tensor's channels.

    Returns:
        Measured, each attribute 0-dim or with an element for each block of over: zeros of no elements.
        ``sqnr_db`` is its signal-to-quantization-noise ratio. There is no gradient.

    Raises:
        The errors of :func:`quantize_tensor`, and ValueError where it takes other than float32 steps.
    """
    *sums, counts = _measured(single_operators.measure, x, qparams, over)
    return Measured(*sums, *counts.unbind(-1))


def measure_limbs(
    x: torch.Tensor, qparams: QuantizationParams, *, over: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Measure a part of a tensor: ``(limbs, max_error, counts)``, which :func:`join_measures` takes.

    Add the limbs and the counts of the parts, and take the maximum of max_error: batches, tiles and
    shards give the bits of the whole.

    Args, raises: as :func:`measure`.

    Returns:
        limbs: int64 of shape (..., 2, 19): the sums of x² and of squared errors, times 2^298, in digits
            of 32 bits, the lowest first.
        max_error: float32 of shape (...,).
        counts: int64 of shape (..., 2): elements outside the limits, and those left out.
    """
    return _measured(single_operators.measure_limbs, x, qparams, over)


def linear_w8a8(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A linear layer of int8 weights and activations: ``x @ (q * scale).T + bias``, nearly.

    Each token of x becomes int8 codes with a scale of its own, as by ``quantize(x, "int8_token")``. The
    products of codes are added exactly. Then come float32 steps, each rounded once:
    ``(sum * x_scale) * scale + bias``. So every machine, device and number of threads returns the same
    bits.

    Args:
        x: floating, of shape (..., K), with K from 1 to 131,071.
        q: int8 weights of shape (N, K), quantized symmetrically.
        scale: float32, 0-dim or of shape (N, 1).
        bias: of a floating dtype and of shape (N,), or None.

    Returns:
        A tensor of shape (..., N) in x's dtype, contiguous. It has no gradient: backward raises.

    Raises:
        TypeError, ValueError or RuntimeError that names the argument, its value and what was expected.
    """
    return single_operators.linear_w8a8(x, q, scale, bias)


def _measured(operator: Callable[..., Any], x: Any, qparams: Any, over: Any) -> Any:
    scale, zero_point, q_min, q_max, f, options = unpack("x", x, qparams)
    if options is None:
        _checks.parameters("x", x, scale, zero_point)
        _checks.measured_steps(x, scale, zero_point)
        options = {}
    over = _checks.block_sizes(over, "over")
    return operator(x, scale, zero_point, q_min, q_max, f.name, **options, over=over)


def _parameters(
    x: torch.Tensor, blocks: Sequence[int] | None, f: Format, q_min: int, q_max: int,
    chosen: Sequence[torch.Tensor], round_first: bool, global_scale: torch.Tensor | None = None,
) -> QuantizationParams:  # fmt: skip
    """What the functions return of parameters chosen by float32 steps."""
    scale, zero_point = chosen
    return QuantizationParams(
        scale, zero_point, q_min, q_max, dtype=f.dtype, block_size=kept(x, blocks),
        global_scale=global_scale, compute_dtype=torch.float32,
        round_first=bool(round_first),
    )  # fmt: skip
