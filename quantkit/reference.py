"""The definition: what every backend of quantkit returns, to the last bit (docs/numerics.md).

Plain torch operations, each rounded to its own dtype, in eager mode, on any device. It is also what
runs where the compiled extension does not. Never let a compiler trace it: inductor computes half
precision wider. First come the six operators by version 1's steps, then by float32 steps: their
``.format`` overloads. Operators with one overload follow, and the public functions over all of them.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

# The steps are in steps.py, codes in formats.py, and how scales are chosen in schemes.py.
from . import _autograd, _checks, _torch, learnable, ops, schemes, sums
from .formats import OF_NAME, OF_NUMBER, WIDEST, Float, rounded
from .params import QuantizationParams
from .steps import (
    Float32Steps,
    before_rounding,
    draws,
    expand,
    first_dtype,
    in_blocks,
    parameter_shape,
    parameters,
    spread_global,
)

__all__ = [
    "QuantizationParams",
    "aminmax",
    "dequantize",
    "dequantize_tensor",
    "dynamic_quantize",
    "fake_quantize",
    "get_asymmetric_qparams",
    "get_symmetric_qparams",
    "linear_w8a8",
    "measure",
    "measure_limbs",
    "quantize",
    "quantize_dequant",
    "quantize_tensor",
]

_Tensor = torch.Tensor
_Blocks = Sequence[int] | None


def _like(x: _Tensor, v: _Tensor) -> _Tensor:
    """v with the strides of torch.empty_like(x), which broadcasting may have changed."""
    return torch.empty_like(x, dtype=v.dtype, requires_grad=False).copy_(v)


def _chosen(
    x: _Tensor, block_size: _Blocks, q_min: int, q_max: int, eps: float, symmetric: bool,
    include_zero: bool, how: schemes.Symmetric = schemes.LARGEST,
) -> tuple[_Tensor, _Tensor]:  # fmt: skip
    """scale and zero_point in x's dtype; a coded scale in its own."""
    shape = parameter_shape(x.shape, block_size)
    if x.numel() == 0:
        return x.new_empty(shape, dtype=how.dtype or x.dtype), x.new_empty(shape)
    blocks, over = in_blocks(x, block_size)
    scheme = schemes.symmetric if symmetric else schemes.asymmetric
    scale, zero_point = scheme(blocks, over, q_min, q_max, eps, include_zero, how)
    return scale.contiguous(), zero_point.contiguous()


# ---- the operators, by version 1's steps ------------------------------------------------------------


def choose_qparams_op(
    x: _Tensor, block_size: _Blocks, q_min: int, q_max: int, eps: float, symmetric: bool,
    include_zero: bool = False,
) -> tuple[_Tensor, _Tensor]:  # fmt: skip
    """scale and zero_point over the whole of x (None) or over blocks (-1: the whole dimension)."""
    _checks.choose_qparams(x, block_size, q_min, q_max, eps, symmetric, include_zero)
    x = x.detach().to(first_dtype(x, q_min, q_max))
    return _chosen(x, block_size, q_min, q_max, eps, symmetric, include_zero)


def quantize_op(
    x: _Tensor, scale: _Tensor, zero_point: _Tensor, q_min: int, q_max: int, dtype: torch.dtype
) -> _Tensor:
    """clip(round(x / scale + zero_point), q_min, q_max), NaN to 0, in dtype."""
    _checks.quantize(x, scale, zero_point, q_min, q_max, dtype)
    v = before_rounding(x, scale, zero_point, q_min, q_max)
    return _like(x, OF_NUMBER[dtype].encode(v, q_min, q_max))


def dequantize_op(q: _Tensor, scale: _Tensor, zero_point: _Tensor) -> _Tensor:
    """(q - zero_point) * scale, from q as float32, in the dtype that torch's promotion gives."""
    _checks.dequantize(q, scale, zero_point)
    scale, zero_point = parameters(q, scale, zero_point, wide=True)
    numbers = OF_NUMBER.get(q.dtype, WIDEST).decode(q.detach())
    return _like(q, (numbers - zero_point) * scale)


def dynamic_quantize_op(
    x: _Tensor, block_size: _Blocks, q_min: int, q_max: int, eps: float, symmetric: bool,
    dtype: torch.dtype, include_zero: bool = False,
) -> tuple[_Tensor, _Tensor, _Tensor]:  # fmt: skip
    """choose_qparams, then quantize with what it returned: (q, scale, zero_point)."""
    _checks.dynamic_quantize(x, block_size, q_min, q_max, eps, symmetric, dtype, include_zero)
    scale, zero_point = choose_qparams_op(x, block_size, q_min, q_max, eps, symmetric, include_zero)
    return quantize_op(x, scale, zero_point, q_min, q_max, dtype), scale, zero_point


def quantize_dequantize_op(
    x: _Tensor, block_size: _Blocks, q_min: int, q_max: int, eps: float, symmetric: bool,
    dtype: torch.dtype, include_zero: bool = False,
) -> tuple[_Tensor, _Tensor, _Tensor, _Tensor]:  # fmt: skip
    """dynamic_quantize, then dequantize of its q: (q, x_hat, scale, zero_point)."""
    q, scale, zero_point = dynamic_quantize_op(
        x, block_size, q_min, q_max, eps, symmetric, dtype, include_zero
    )
    return q, dequantize_op(q, scale, zero_point), scale, zero_point


def fake_quantize_op(
    x: _Tensor, scale: _Tensor, zero_point: _Tensor, q_min: int, q_max: int
) -> _Tensor:
    """dequantize(quantize(x)) in x's dtype (float32 for integer x); no gradient."""
    q = quantize_op(x, scale, zero_point, q_min, q_max, WIDEST.dtype)
    dtype = x.dtype if x.is_floating_point() else torch.float32
    return _like(x, rounded(dequantize_op(q, scale, zero_point), dtype))


def _mask(x: _Tensor, scale: _Tensor, zero_point: _Tensor, q_min: int, q_max: int) -> _Tensor:
    """Whether q_min <= round(x / scale + zero_point) <= q_max: False at NaN."""
    v = torch.round(before_rounding(x, scale, zero_point, q_min, q_max))
    return _like(x, (v >= q_min) & (v <= q_max))


def fake_quantize_masked_op(
    x: _Tensor, scale: _Tensor, zero_point: _Tensor, q_min: int, q_max: int
) -> tuple[_Tensor, _Tensor]:
    """fake_quantize, and the mask of its gradient."""
    given = (x, scale, zero_point, q_min, q_max)
    return fake_quantize_op(*given), _mask(*given)


def masked_gradient_op(grad: _Tensor, mask: _Tensor) -> _Tensor:
    """grad where mask is, 0 elsewhere."""
    _checks.masked_gradient(grad, mask)
    zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
    return _like(mask, torch.where(mask, grad.detach(), zero))


def fake_quantize_backward_op(
    grad: _Tensor, x: _Tensor, scale: _Tensor, zero_point: _Tensor, q_min: int, q_max: int
) -> _Tensor:
    """The same gradient without a mask, for programs that contract 1 exported."""
    _checks.fake_quantize_backward(grad, x, scale, zero_point, q_min, q_max)
    return masked_gradient_op(grad, _mask(x, scale, zero_point, q_min, q_max))


# ---- the operators' .format overloads, by float32 steps ---------------------------------------------


def choose_qparams_format_op(
    x: _Tensor, block_size: _Blocks, q_min: int, q_max: int, eps: float, symmetric: bool,
    format: str, *, include_zero: bool = False, scale_dtype: torch.dtype | None = None,
    scale_rule: str | None = None, global_scale: _Tensor | None = None,
) -> tuple[_Tensor, _Tensor]:  # fmt: skip
    """scale, in float32 or coded, and zero_point; float formats have a 0-dim zero_point of 0."""
    _checks.choose_qparams_format(
        x, block_size, q_min, q_max, eps, symmetric, format, include_zero=include_zero,
        scale_dtype=scale_dtype, scale_rule=scale_rule, global_scale=global_scale,
    )  # fmt: skip
    x, f = x.detach().to(torch.float32), OF_NAME[format]
    how = schemes.Symmetric(
        scale_rule, scale_dtype, f.mantissa if isinstance(f, Float) else 0,
        spread_global(global_scale, x.device, parameter_shape(x.shape, block_size)),
    )  # fmt: skip
    scale, zero_point = _chosen(x, block_size, q_min, q_max, eps, symmetric, include_zero, how)
    return scale, zero_point if f.has_zero_point else x.new_zeros(())


def quantize_format_op(
    x: _Tensor, scale: _Tensor, zero_point: _Tensor | None, q_min: int, q_max: int, format: str, *,
    block_size: _Blocks = None, global_scale: _Tensor | None = None, seed: _Tensor | None = None,
    index: Sequence[int] | None = None, round_first: bool = False,
) -> _Tensor:  # fmt: skip
    """x / scale + zero_point as codes; those of fewer than 8 bits packed, and contiguous."""
    _checks.quantize_format(
        x, scale, zero_point, q_min, q_max, format, block_size=block_size,
        global_scale=global_scale, seed=seed, index=index, round_first=round_first,
    )  # fmt: skip
    f = OF_NAME[format]
    steps = Float32Steps(x.device, x.shape, scale, zero_point, block_size, global_scale)
    codes = f.encode(steps.there(x, round_first), q_min, q_max, draws(x, seed, index))
    return f.pack(codes) if f.per_byte > 1 else _like(x, codes)


def dequantize_format_op(
    q: _Tensor, scale: _Tensor, zero_point: _Tensor | None, format: str, *,
    block_size: _Blocks = None, global_scale: _Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> _Tensor:  # fmt: skip
    """(number - zero_point) * scale in float32, then in output_dtype."""
    _checks.dequantize_format(
        q, scale, zero_point, format, block_size=block_size, global_scale=global_scale,
        output_dtype=output_dtype,
    )  # fmt: skip
    f = OF_NAME[format]
    codes = f.unpack(q.detach().view(torch.uint8) if f.per_byte > 1 else q.detach())
    steps = Float32Steps(q.device, codes.shape, scale, zero_point, block_size, global_scale)
    x_hat = steps.back(f.decode(codes)).to(output_dtype or torch.float32)
    # Not contiguous(): empty tensors keep any strides there.
    return x_hat.clone(memory_format=torch.contiguous_format) if f.per_byte > 1 else _like(q, x_hat)


def dynamic_quantize_format_op(
    x: _Tensor, block_size: _Blocks, q_min: int, q_max: int, eps: float, symmetric: bool,
    format: str, *, seed: _Tensor | None = None, index: Sequence[int] | None = None,
    round_first: bool = False, **choosing: Any,
) -> tuple[_Tensor, _Tensor, _Tensor]:  # fmt: skip
    """choose_qparams, then quantize with what it returned: (q, scale, zero_point)."""
    args: Any = (x, block_size, q_min, q_max, eps, symmetric, format)
    rounding: dict[str, Any] = {"seed": seed, "index": index, "round_first": round_first}
    _checks.dynamic_quantize_format(*args, **(rounding | choosing))
    scale, zero_point = choose_qparams_format_op(*args, **choosing)
    q = quantize_format_op(
        x, scale, zero_point if OF_NAME[format].has_zero_point else None, q_min, q_max, format,
        block_size=block_size, global_scale=choosing.get("global_scale"), **rounding,
    )  # fmt: skip
    return q, scale, zero_point


def quantize_dequantize_format_op(
    x: _Tensor, block_size: _Blocks, q_min: int, q_max: int, eps: float, symmetric: bool,
    format: str, *, output_dtype: torch.dtype | None = None, **options: Any,
) -> tuple[_Tensor, _Tensor, _Tensor, _Tensor]:  # fmt: skip
    """dynamic_quantize, then dequantize of its q: (q, x_hat, scale, zero_point)."""
    args: Any = (x, block_size, q_min, q_max, eps, symmetric, format)
    _checks.dynamic_quantize_format(*args, output_dtype=output_dtype, **options)
    q, scale, zero_point = dynamic_quantize_format_op(*args, **options)
    x_hat = dequantize_format_op(
        q, scale, zero_point if OF_NAME[format].has_zero_point else None, format,
        block_size=block_size, global_scale=options.get("global_scale"), output_dtype=output_dtype,
    )  # fmt: skip
    return q, x_hat, scale, zero_point


def fake_quantize_format_op(
    x: _Tensor, scale: _Tensor, zero_point: _Tensor | None, q_min: int, q_max: int, format: str,
    **options: Any,
) -> _Tensor:  # fmt: skip
    """dequantize(quantize(x)) in x's dtype (float32 for integer x); no gradient."""
    return fake_quantize_masked_format_op(x, scale, zero_point, q_min, q_max, format, **options)[0]


def fake_quantize_masked_format_op(
    x: _Tensor, scale: _Tensor, zero_point: _Tensor | None, q_min: int, q_max: int, format: str, *,
    block_size: _Blocks = None, global_scale: _Tensor | None = None, seed: _Tensor | None = None,
    index: Sequence[int] | None = None, round_first: bool = False,
) -> tuple[_Tensor, _Tensor]:  # fmt: skip
    """fake_quantize, and the mask of its gradient: what is not clipped."""
    _checks.fake_quantize_format(
        x, scale, zero_point, q_min, q_max, format, block_size=block_size,
        global_scale=global_scale, seed=seed, index=index, round_first=round_first,
    )  # fmt: skip
    steps = Float32Steps(x.device, x.shape, scale, zero_point, block_size, global_scale)
    u = draws(x, seed, index)
    _, inside, numbers = steps.coded(x, OF_NAME[format], q_min, q_max, round_first, u)
    dtype = x.dtype if x.is_floating_point() else torch.float32
    return _like(x, steps.back(numbers).to(dtype)), _like(x, inside)


# ---- extremes ---------------------------------------------------------------------------------------

_MOST = 2**63 - 1


def _ordered(x: _Tensor) -> _Tensor:
    """int64 in the order of x: NaN beyond the infinities, -0.0 below 0.0."""
    if x.is_floating_point():
        return _bits_in_order(x.to(torch.float64).resolve_neg().view(torch.int64))
    return x.to(torch.int64) ^ (~_MOST if x.dtype == torch.uint64 else 0)


def _bits_in_order(bits: _Tensor) -> _Tensor:
    """From the bits of float64 to integers in their order, and back."""
    return bits ^ ((bits >> 63) & _MOST)


def _unordered(keys: _Tensor, dtype: torch.dtype) -> _Tensor:
    """What has these numbers in its order."""
    if dtype.is_floating_point:
        return _bits_in_order(keys).view(torch.float64).to(dtype)
    return (keys ^ (~_MOST if dtype == torch.uint64 else 0)).to(dtype)


def aminmax_op(x: _Tensor, block_size: _Blocks) -> tuple[_Tensor, _Tensor]:
    """min and max of each block, in x's dtype; both NaN where a block has one."""
    _checks.aminmax(x, block_size)
    if x.numel() == 0:
        shape = parameter_shape(x.shape, block_size)
        return x.new_empty(shape), x.new_empty(shape)
    blocks, over = in_blocks(_ordered(x.detach()), block_size)
    low, high = (_unordered(over(r, blocks), x.dtype) for r in (torch.amin, torch.amax))
    if x.is_floating_point():
        nan = low.isnan() | high.isnan()
        low, high = (t.masked_fill(nan, torch.nan) for t in (low, high))
    return low.contiguous(), high.contiguous()


# ---- sums of errors ---------------------------------------------------------------------------------


def measure_op(x: _Tensor, *args: Any, **options: Any) -> tuple[_Tensor, _Tensor, _Tensor, _Tensor]:
    """measure_limbs, with the sums rounded: (squares, squared_errors, max_error, counts)."""
    limbs, max_error, counts = measure_limbs_op(x, *args, **options)
    flat = limbs.reshape(-1, 2, sums.DIGITS)  # torch ends at 64 dimensions: x may have as many
    both = (t.clone(memory_format=torch.contiguous_format) for t in sums.rounded(flat).unbind(-1))
    squares, errors = (t.reshape(max_error.shape) for t in both)
    return squares, errors, max_error, counts


def measure_limbs_op(
    x: _Tensor, scale: _Tensor, zero_point: _Tensor | None, q_min: int, q_max: int, format: str, *,
    block_size: _Blocks = None, global_scale: _Tensor | None = None, round_first: bool = False,
    over: _Blocks = None,
) -> tuple[_Tensor, _Tensor, _Tensor]:  # fmt: skip
    """Sums of x² and of (x_hat - x)² over blocks in digits, the greatest error, and counts."""
    _checks.measure(
        x, scale, zero_point, q_min, q_max, format, block_size=block_size,
        global_scale=global_scale, round_first=round_first, over=over,
    )  # fmt: skip
    steps = Float32Steps(x.device, x.shape, scale, zero_point, block_size, global_scale)
    v, inside, numbers = steps.coded(x, OF_NAME[format], q_min, q_max, round_first)
    x = x.detach().to(torch.float32)
    error = steps.back(numbers) - x
    finite = torch.isfinite(error)

    shape = parameter_shape(x.shape, over)
    blocks = math.prod(shape)
    block = torch.arange(blocks, device=x.device).reshape(shape)
    block = expand(block, x.shape, over).expand(x.shape).flatten()

    def counted(which: _Tensor) -> _Tensor:
        zeros = block.new_zeros(blocks)
        return zeros.index_add_(0, block, which.flatten().to(torch.int64)).reshape(shape)

    kept = [torch.where(finite, t, 0).flatten() for t in (x, error)]
    limbs = torch.stack([sums.of_squares(t, block, blocks) for t in kept], 1)
    max_error = x.new_zeros(blocks).scatter_reduce_(0, block, kept[1].abs(), "amax")
    outside = counted(~inside & ~torch.isnan(v))
    return (
        limbs.reshape(*shape, 2, sums.DIGITS), max_error.reshape(shape),
        torch.stack([outside, counted(~finite)], -1),
    )  # fmt: skip


# ---- linear layers ----------------------------------------------------------------------------------


def linear_w8a8_op(x: _Tensor, q: _Tensor, scale: _Tensor, bias: _Tensor | None = None) -> _Tensor:
    """x by q transposed, both as int8: exact sums, then float32 steps, in x's dtype."""
    _checks.linear_w8a8(x, q, scale, bias)
    made = x.new_empty(*x.shape[:-1], q.shape[0])
    if made.numel() == 0:
        return made
    tokens = [1] * (x.dim() - 1) + [-1]
    codes, x_scale, _ = dynamic_quantize_format_op(x, tokens, -128, 127, 1e-8, True, "int8")
    # float64 holds every sum of up to 2^17 products of int8.
    sums_of_products = codes.to(torch.float64) @ q.detach().to(torch.float64).t()
    sums_of_products += 0.0  # an integer's zero: a product of one column may be -0.0
    per_output = scale.detach().to(x.device).reshape(-1)
    y = sums_of_products.to(torch.float32) * x_scale * per_output
    if bias is not None:
        y = y + bias.detach().to(torch.float32)
    return made.copy_(y)


# ---- the public functions: those of quantkit/ops.py over the operators above ------------------------


def _of_plain(operators: Any) -> Any:
    """The same, refusing DTensors: torch would take blocks of their shards."""

    def refusing(operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args, **options):
            _torch.no_dtensors("reference", *args, *options.values())
            return operator(*args, **options)

        return call

    return type(operators)(**{name: refusing(f) for name, f in vars(operators).items()})


_OF_PARAMETERS = learnable.scale_gradient_op, learnable.zero_point_gradient_op
_OPERATORS = ops.Operators(
    choose_qparams=choose_qparams_op,
    quantize=quantize_op,
    dequantize=dequantize_op,
    dynamic_quantize=dynamic_quantize_op,
    quantize_dequantize=quantize_dequantize_op,
    fake_quantize=_autograd.reference(
        fake_quantize_op, fake_quantize_masked_op, masked_gradient_op, _OF_PARAMETERS
    ),
)
_FORMAT_OPERATORS = ops.Operators(
    choose_qparams=choose_qparams_format_op,
    quantize=quantize_format_op,
    dequantize=dequantize_format_op,
    dynamic_quantize=dynamic_quantize_format_op,
    quantize_dequantize=quantize_dequantize_format_op,
    fake_quantize=_autograd.reference(
        fake_quantize_format_op,
        fake_quantize_masked_format_op,
        masked_gradient_op,
        _OF_PARAMETERS,
    ),
)
_SINGLE_OPERATORS = ops.SingleOperators(
    aminmax=aminmax_op, measure=measure_op, measure_limbs=measure_limbs_op,
    linear_w8a8=_autograd.without_gradient(linear_w8a8_op),
)  # fmt: skip
_Function = TypeVar("_Function", bound=Callable[..., Any])
# What the functions find here in place of torch.ops.quantkit's operators.
_NAMES: dict[str, Any] = {
    **vars(ops), "operators": _of_plain(_OPERATORS),
    "format_operators": _of_plain(_FORMAT_OPERATORS),
    "single_operators": _of_plain(_SINGLE_OPERATORS),
}  # fmt: skip
del _NAMES["__name__"]  # of a module whose `operators` a compiler would take instead


def _over_reference(function: _Function) -> _Function:
    """The same code over these operators."""
    made: Any = types.FunctionType(function.__code__, _NAMES, None, function.__defaults__)
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    made.__module__, made.__doc__ = __name__, f"See :func:`quantkit.{function.__name__}`."
    _NAMES[function.__name__] = made  # for functions that call others
    return made


get_symmetric_qparams = _over_reference(ops.get_symmetric_qparams)
get_asymmetric_qparams = _over_reference(ops.get_asymmetric_qparams)
quantize_tensor = _over_reference(ops.quantize_tensor)
dequantize_tensor = _over_reference(ops.dequantize_tensor)
quantize_dequant = _over_reference(ops.quantize_dequant)
dynamic_quantize = _over_reference(ops.dynamic_quantize)
fake_quantize = _over_reference(ops.fake_quantize)
aminmax = _over_reference(ops.aminmax)
measure = _over_reference(ops.measure)
measure_limbs = _over_reference(ops.measure_limbs)
linear_w8a8 = _over_reference(ops.linear_w8a8)
quantize = _over_reference(ops.quantize)
dequantize = _over_reference(ops.dequantize)
