"""The operators of ``torch.ops.quantkit``: one table of schemas, references, checks and results.

A new overload is a row of OPERATORS, a function in reference.py and its errors in _checks/operators.py.
A row without a name behind a dot is the default overload, which is version 1's. csrc has the same
schemas, literally; tests/test_operators.py compares them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import _checks, _torch, learnable, reference, steps, sums
from .formats import OF_NAME, Format

_Function = Callable[..., Any]

# ---- results without values -----------------------------------------------------------------------


def _like(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(t, dtype=dtype, requires_grad=False)


def _parameters(x, block_size, q_min, q_max, *_):
    shape = steps.parameter_shape(x.shape, block_size)
    dtype = steps.first_dtype(x, q_min, q_max)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _codes(x, scale, zero_point, q_min, q_max, dtype):
    return _like(x, dtype)


def _dequantized(q, scale, zero_point):
    return _like(q, _checks.promoted(q, scale, zero_point))


def _codes_and_parameters(x, block_size, q_min, q_max, eps, symmetric, dtype, *_):
    return _like(x, dtype), *_parameters(x, block_size, q_min, q_max)


def _codes_numbers_and_parameters(*args):
    q, *parameters = _codes_and_parameters(*args)
    return q, _dequantized(q, *parameters), *parameters


def _numbers(x, *_, **__):
    return _like(x, x.dtype if x.is_floating_point() else torch.float32)


def _numbers_and_mask(x, *_, **__):
    return _numbers(x), _like(x, torch.bool)


def _extremes(x, block_size):
    shape = steps.parameter_shape(x.shape, block_size)
    return x.new_empty(shape), x.new_empty(shape)


def _outputs(x, q, scale, bias=None):
    return x.new_empty(*x.shape[:-1], q.shape[0])


def _gradient(grad, like, *_):
    return _like(like, grad.dtype)


def _scale_gradient(grad, x, scale, *_, **__):
    return scale.new_empty(scale.shape)


def _zero_point_gradient(grad, x, scale, zero_point, *_, **__):
    return zero_point.new_empty(zero_point.shape)


# Of the .format overloads.


def _format_parameters(
    x, block_size, q_min, q_max, eps, symmetric, format, *, scale_dtype=None, **_
):
    shape = steps.parameter_shape(x.shape, block_size)
    zero_shape = shape if OF_NAME[format].has_zero_point else ()
    scale = x.new_empty(shape, dtype=scale_dtype or torch.float32)
    return scale, x.new_empty(zero_shape, dtype=torch.float32)


def _stored(x, f: Format):
    if f.per_byte == 1:
        return _like(x, f.storage)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // f.per_byte), dtype=f.storage)


def _format_codes(x, scale, zero_point, q_min, q_max, format, **_):
    return _stored(x, OF_NAME[format])


def _format_dequantized(q, scale, zero_point, format, *, output_dtype=None, **_):
    f, dtype = OF_NAME[format], output_dtype or torch.float32
    if f.per_byte == 1:
        return _like(q, dtype)
    return q.new_empty(_checks.elements_of(q.shape, f), dtype=dtype)


def _format_codes_and_parameters(x, *choice, **options):
    return _stored(x, OF_NAME[choice[-1]]), *_format_parameters(x, *choice, **options)


def _format_codes_numbers_and_parameters(x, *choice, output_dtype=None, **options):
    q, scale, zero_point = _format_codes_and_parameters(x, *choice, **options)
    x_hat = _format_dequantized(q, scale, zero_point, choice[-1], output_dtype=output_dtype)
    return q, x_hat, scale, zero_point


def _limbs(x, *_, over=None, **__):
    shape = steps.parameter_shape(x.shape, over)
    limbs = x.new_empty((*shape, 2, sums.DIGITS), dtype=torch.int64)
    return limbs, *_measured_beside(x, shape)


def _measured(x, *_, over=None, **__):
    shape = steps.parameter_shape(x.shape, over)
    squares, errors = (x.new_empty(shape, dtype=torch.float64) for _ in range(2))
    return squares, errors, *_measured_beside(x, shape)


def _measured_beside(x, shape):
    return x.new_empty(shape, dtype=torch.float32), x.new_empty((*shape, 2), dtype=torch.int64)


# ---- the table --------------------------------------------------------------------------------------


class Operator(NamedTuple):
    arguments: str  # of the schema
    results: tuple[str, ...]  # their names, which are also those of the `out=` arguments
    reference: _Function
    check: _Function  # raises the contract's exact errors
    shaped: _Function  # the results without values: for torch.compile, export and meta tensors


_CHOOSE = (
    "Tensor x, int[]? block_size, int q_min, int q_max, float eps, bool symmetric, "
    "{dtype}bool include_zero=False"
)
_DYNAMIC = _CHOOSE.format(dtype="ScalarType dtype, ")
_GIVEN = "Tensor x, Tensor scale, Tensor zero_point, int q_min, int q_max"
_FAKE = Operator(_GIVEN, ("out",), reference.fake_quantize_op, _checks.quantize, _numbers)

# The arguments of .format overloads, in groups that several take.
_SCALED = "SymInt[]? block_size=None, Tensor? global_scale=None"
_ROUNDED = "Tensor? seed=None, SymInt[]? index=None, bool round_first=False"
_FORMAT_CHOOSE = (
    "Tensor x, SymInt[]? block_size, int q_min, int q_max, float eps, bool symmetric, str format, *, "
    "bool include_zero=False, ScalarType? scale_dtype=None, str? scale_rule=None, "
    "Tensor? global_scale=None"
)
_FORMAT_DYNAMIC = f"{_FORMAT_CHOOSE}, {_ROUNDED}"
_FORMAT_GIVEN = (
    "Tensor x, Tensor scale, Tensor? zero_point, int q_min, int q_max, str format, *, "
    f"{_SCALED}, {_ROUNDED}"
)
_MEASURED = (
    "Tensor x, Tensor scale, Tensor? zero_point, int q_min, int q_max, str format, *, "
    f"{_SCALED}, bool round_first=False, SymInt[]? over=None"
)
_FORMAT_FAKE = Operator(_FORMAT_GIVEN, ("out",),
    reference.fake_quantize_format_op, _checks.fake_quantize_format, _numbers)  # fmt: skip

OPERATORS = {
    "choose_qparams": Operator(_CHOOSE.format(dtype=""), ("scale", "zero_point"),
        reference.choose_qparams_op, _checks.choose_qparams, _parameters),
    "choose_qparams.format": Operator(_FORMAT_CHOOSE, ("scale", "zero_point"),
        reference.choose_qparams_format_op, _checks.choose_qparams_format, _format_parameters),
    "quantize": Operator(_GIVEN + ", ScalarType dtype", ("out",),
        reference.quantize_op, _checks.quantize, _codes),
    "quantize.format": Operator(_FORMAT_GIVEN, ("out",),
        reference.quantize_format_op, _checks.quantize_format, _format_codes),
    "dequantize": Operator("Tensor q, Tensor scale, Tensor zero_point", ("out",),
        reference.dequantize_op, _checks.dequantize, _dequantized),
    "dequantize.format": Operator(
        f"Tensor q, Tensor scale, Tensor? zero_point, str format, *, {_SCALED}, "
        "ScalarType? output_dtype=None", ("out",),
        reference.dequantize_format_op, _checks.dequantize_format, _format_dequantized),
    "dynamic_quantize": Operator(_DYNAMIC, ("q", "scale", "zero_point"),
        reference.dynamic_quantize_op, _checks.dynamic_quantize, _codes_and_parameters),
    "dynamic_quantize.format": Operator(_FORMAT_DYNAMIC, ("q", "scale", "zero_point"),
        reference.dynamic_quantize_format_op, _checks.dynamic_quantize_format,
        _format_codes_and_parameters),
    "quantize_dequantize": Operator(_DYNAMIC, ("q", "x_hat", "scale", "zero_point"),
        reference.quantize_dequantize_op, _checks.dynamic_quantize, _codes_numbers_and_parameters),
    "quantize_dequantize.format": Operator(
        f"{_FORMAT_DYNAMIC}, ScalarType? output_dtype=None", ("q", "x_hat", "scale", "zero_point"),
        reference.quantize_dequantize_format_op, _checks.dynamic_quantize_format,
        _format_codes_numbers_and_parameters),
    "aminmax": Operator("Tensor x, SymInt[]? block_size", ("min", "max"),
        reference.aminmax_op, _checks.aminmax, _extremes),
    "fake_quantize": _FAKE,
    "fake_quantize.format": _FORMAT_FAKE,
    "measure": Operator(_MEASURED, ("squares", "squared_errors", "max_error", "counts"),
        reference.measure_op, _checks.measure, _measured),
    "measure_limbs": Operator(_MEASURED, ("limbs", "max_error", "counts"),
        reference.measure_limbs_op, _checks.measure, _limbs),
    "linear_w8a8": Operator("Tensor x, Tensor q, Tensor scale, Tensor? bias=None", ("out",),
        reference.linear_w8a8_op, _checks.linear_w8a8, _outputs),
    # The same without a gradient (an Autograd kernel costs every call), with its mask, and the gradient.
    "_fake_quantize": _FAKE,
    "_fake_quantize.format": _FORMAT_FAKE,
    "_fake_quantize_masked": Operator(_GIVEN, ("out", "mask"),
        reference.fake_quantize_masked_op, _checks.quantize, _numbers_and_mask),
    "_fake_quantize_masked.format": Operator(_FORMAT_GIVEN, ("out", "mask"),
        reference.fake_quantize_masked_format_op, _checks.fake_quantize_format, _numbers_and_mask),
    "_masked_gradient": Operator("Tensor grad, Tensor mask", ("out",),
        reference.masked_gradient_op, _checks.masked_gradient, _gradient),
    # The gradient from x and the parameters: programs that contract 1 exported hold it.
    "_fake_quantize_backward": Operator("Tensor grad, " + _GIVEN, ("out",),
        reference.fake_quantize_backward_op, _checks.fake_quantize_backward, _gradient),
}  # fmt: skip

# Operators of torch's own operations on every backend: not in csrc, and without an `out` overload.
GRADIENTS = {
    f"_{parameter}_gradient{overload}": Operator(f"Tensor grad, {arguments}", ("out",),
        function, _checks.parameter_gradient, shaped)
    for parameter, function, shaped in (
        ("scale", learnable.scale_gradient_op, _scale_gradient),
        ("zero_point", learnable.zero_point_gradient_op, _zero_point_gradient))
    for overload, arguments in (("", _GIVEN), (".format", _FORMAT_GIVEN))
}  # fmt: skip
_EVERY = OPERATORS | GRADIENTS


def schemas(name: str) -> tuple[str, str]:
    """The functional schema and that of the ``out`` overload."""
    arguments, results, *_ = _EVERY[name]
    returns = "Tensor" if len(results) == 1 else f"({', '.join(['Tensor'] * len(results))})"
    outs = ", ".join(f"Tensor({chr(97 + i)}!) {result}" for i, result in enumerate(results))
    by_name = "" if "*, " in arguments else "*, "
    out = f"{name}_out" if "." in name else f"{name}.out"
    return f"{name}({arguments}) -> {returns}", f"{out}({arguments}, {by_name}{outs}) -> ()"


def functional(name: str) -> Any:
    """What the functional schema is registered as."""
    operator, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.quantkit, operator), overload or "default")


def overloads(name: str) -> tuple[Any, Any]:
    """The functional overload and the ``out`` overload."""
    operator, _, overload = name.partition(".")
    packet = getattr(torch.ops.quantkit, operator)
    return functional(name), getattr(packet, f"{overload}_out" if overload else "out")


# ---- fake kernels -----------------------------------------------------------------------------------

_AOT_CHANGES_DTYPES = _torch.RELEASE < (2, 12)


def _check_compiler() -> None:
    """AOTInductor before torch 2.12 hands operators another dtype than was asked for (pytorch#169157)."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    if _AOT_CHANGES_DTYPES and virtualized and virtualized.V.aot_compilation:
        raise RuntimeError(
            "AOTInductor before torch 2.12 changes the dtype of operators' results; "
            "remedy: package with torch 2.12 or newer, or use torch.export alone"
        )


def fake(name: str) -> _Function:
    """The fake kernel: the checks, then results without values."""
    operator = _EVERY[name]
    dtypes = re.findall(r"ScalarType\?? (\w+)", operator.arguments)

    def kernel(*args, **options):
        if "dtype" in dtypes or any(options.get(name) is not None for name in dtypes):
            _check_compiler()
        operator.check(*args, **options)
        return operator.shaped(*args, **options)

    return kernel
