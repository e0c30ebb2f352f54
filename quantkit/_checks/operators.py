"""The operators, with their arguments."""

from __future__ import annotations

from typing import Any

import torch

from .. import _torch
from ..formats import CODED_SCALES, E4M3, E8M0, WIDEST
from ..schemes import POWERS, RULES
from .parameters import format_parameters, global_parameter, on_the_device, parameters, q_range
from .sizes import blocks, blocks_in, known, surely
from .values import (
    FLOATING,
    MASK,
    are_ints,
    codes,
    flag,
    format_named,
    format_numbered,
    number,
    one_of,
    same,
    shown,
    shown_sizes,
    tensor,
    wrong,
)


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
    blockless = any(surely(n == 0) and b != -1 for n, b in pairs)
    if surely(x.numel() == 0) and not blockless:
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
    same(TypeError, "grad", "dtype", grad.dtype, x.dtype, ", that of x")
    same(ValueError, "grad", "shape", tuple(grad.shape), tuple(x.shape))
    same(RuntimeError, "grad", "device", grad.device, x.device, ", that of x")


def parameter_gradient(grad, x, scale, zero_point, q_min, q_max, *format, **options):
    if format:
        fake_quantize_format(x, scale, zero_point, q_min, q_max, *format, **options)
    else:
        quantize(x, scale, zero_point, q_min, q_max)
    tensor("grad", grad, FLOATING)
    same(ValueError, "grad", "shape", tuple(grad.shape), tuple(x.shape), ", that of x")
    same(RuntimeError, "grad", "device", grad.device, x.device, ", that of x")


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
    if not shape or surely(x.shape[-1] == 0) or surely(x.shape[-1] > MOST_COLUMNS):
        sizes = f"a last dimension of 1 to {MOST_COLUMNS} elements"
        raise wrong(ValueError, "x", sizes, f"shape {shape}")
    columns = x.shape[-1]
    if q.dim() != 2 or surely(q.shape[1] != columns):
        expected = f"shape (outputs, {columns}), as x has shape {shape}"
        raise wrong(ValueError, "q", expected, tuple(q.shape))
    outputs = q.shape[0]
    each = scale.dim() == 2 and not surely((scale.shape[0] != outputs) | (scale.shape[1] != 1))
    if scale.dim() != 0 and not each:
        expected = f"shape () or ({outputs}, 1)"
        raise wrong(ValueError, "scale", expected, tuple(scale.shape))
    if bias is not None and (bias.dim() != 1 or surely(bias.shape[0] != outputs)):
        raise wrong(ValueError, "bias", f"shape ({outputs},)", tuple(bias.shape))
    for name, t in (("q", q), ("scale", scale), ("bias", bias)):
        if t is not None:
            on_the_device(name, t, "x", x)


def masked_gradient(grad, mask):
    tensor("grad", grad, FLOATING)
    tensor("mask", mask, MASK)
    same(ValueError, "grad", "shape", tuple(grad.shape), tuple(mask.shape), ", that of mask")
    same(RuntimeError, "grad", "device", grad.device, mask.device, ", that of mask")


def scale_choice(f, symmetric, eps, scale_dtype, scale_rule, global_scale):
    """What there is of scales for a format."""
    if not any(scale_dtype is d for d in (None, torch.float32, *CODED_SCALES)):
        dtypes = one_of((None, torch.float32, *CODED_SCALES))
        raise wrong(TypeError, "scale_dtype", dtypes, shown(scale_dtype))
    if scale_rule is not None:
        if not isinstance(scale_rule, str):
            raise wrong(TypeError, "scale_rule", "a str or None", type(scale_rule).__name__)
        if scale_rule not in RULES:
            raise wrong(ValueError, "scale_rule", one_of((None, *RULES)), shown(scale_rule))
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
    if len(pair) != 2 or not are_ints(list(map(number, pair))):
        found = shown_sizes(list(seed)) if isinstance(seed, (list, tuple)) else shown(seed)
        raise wrong(TypeError, "seed", "an int, a pair of ints or a torch.Tensor", found)
    low, high = (int(number(value)) for value in pair)
    if not all(-(2**63) <= value < 2**63 for value in (low, high)):
        raise wrong(ValueError, "seed", "ints from -2^63 to 2^63 - 1", shown_sizes([low, high]))
    return low, high


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
    if known(least < 0) or known(most > 2**63 - 1):
        raise ValueError(
            f"index: expected places of x's elements in [0, 2^63 - 1], got {shown_sizes(index)} "
            f"for x of shape {shape}"
        )


def _list_of_ints(name, value):
    if are_ints(value):
        return value
    ints = list(map(number, value)) if isinstance(value, (list, tuple)) else value
    if not are_ints(ints):
        raise wrong(TypeError, name, "a list of ints", shown_sizes(value))
    return ints


def shard(global_shape, start):
    """Both as lists of ints."""
    global_shape, start = _list_of_ints("global_shape", global_shape), _list_of_ints("start", start)
    if len(global_shape) != len(start):
        sizes = f"{len(global_shape)} ints, one per dimension of {shown_sizes(list(global_shape))}"
        raise wrong(ValueError, "start", sizes, shown_sizes(list(start)))
    for n, at in zip(global_shape, start, strict=True):
        if surely(n < 0):
            sizes = shown_sizes(list(global_shape))
            raise wrong(ValueError, "global_shape", "sizes from 0 on", sizes)
        if surely(at < 0) or surely(at > n):
            within = f"a place within {shown_sizes(list(global_shape))}"
            raise wrong(ValueError, "start", within, shown_sizes(list(start)))
    return global_shape, start


def packable(x, f):
    """Whole bytes along the last dimension."""
    if f.per_byte > 1 and (x.dim() == 0 or surely(x.shape[-1] % f.per_byte != 0)):
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


def promoted(x, scale, zero_point):
    """The dtype that torch gives float32 numbers of x's shape beside version 1's parameters."""
    # Integer zero points become scale's dtype first.
    zero_dtype = zero_point.dtype if zero_point.is_floating_point() else scale.dtype
    for p, dtype in ((scale, scale.dtype), (zero_point, zero_dtype)):
        if dtype == torch.float64 and (p.dim() > 0 or x.dim() == 0):
            return torch.float64
    return torch.float32


def measured_steps(x, scale, zero_point):
    """That version 1's steps of x are float32 steps: codes of others are not those that are measured."""
    dtype = promoted(x, scale, zero_point)
    if dtype == torch.float32 and x.is_floating_point():
        dtype = x.dtype
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
        same(RuntimeError, name, "device", t.device, limbs.device, ", that of limbs")
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
