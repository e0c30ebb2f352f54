"""ONNX: how torch.onnx.export writes quantkit's operators, by ONNX's operators of the same steps.

torch.onnx.export(model, args, custom_translation_table=quantkit.onnx.translation_table())

docs/onnx.md says which calls it takes. This needs onnxscript, as torch.onnx itself does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .formats import OF_NAME, Format
from .operators import functional

__all__ = ["translation_table"]

_NAMES = ("choose_qparams", "quantize", "dequantize", "dynamic_quantize", "quantize_dequantize")
_FAKE = ("fake_quantize", "_fake_quantize")
_Value = Any  # a value of the graph, with shape and dtype where the exporter knows them


def translation_table(*, qdq: bool = False) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What ``custom_translation_table`` of torch.onnx.export takes.

    Args:
        qdq: write QuantizeLinear and DequantizeLinear where their bits are quantkit's, for numbers that
            are not NaN and zero points that are integers. These are int8 and uint8 with all their codes,
            and one scale or one for each index of one dimension. To quantize it also takes
            ``round_first=True``, no zero point, or a symmetric scale that the call itself chooses.

    Raises:
        ModuleNotFoundError where onnxscript is missing.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise ModuleNotFoundError(
            "quantkit.onnx needs onnxscript, as torch.onnx.export does: pip install onnxscript",
            name="onnxscript",
        )
    table = {functional(name): function for name, function in _functions(bool(qdq)).items()}
    return table | {torch.ops.aten.view.dtype: _called(_Writer.view, qdq)}  # of a layer's bytes


def _functions(qdq: bool) -> dict[str, Callable[..., Any]]:
    made: dict[str, Callable[..., Any]] = {}
    for name in _NAMES:
        for overload in ("", ".format"):
            method = getattr(_Writer, name + overload.replace(".", "_"))
            made[name + overload] = _called(method, qdq)
    for name in _FAKE:
        made[name] = _called(_Writer.fake_quantize, qdq)
        made[f"{name}.format"] = _called(_Writer.fake_quantize_format, qdq)
    made["aminmax"] = _called(_Writer.aminmax, qdq)
    made["linear_w8a8"] = _called(_Writer.linear_w8a8, qdq)
    return made


def _called(method: Callable[..., Any], qdq: bool) -> Callable[..., Any]:
    def function(*args: Any, **options: Any) -> Any:
        return method(_Writer(qdq), *args, **options)

    return function


def _unsupported(what: str, value: object) -> Exception:
    return ValueError(f"quantkit.onnx cannot write {what} {value}: docs/onnx.md has what it can")


class _Writer:
    """Writes the steps of an operator; numbers are float32 on the way."""

    def __init__(self, qdq: bool) -> None:
        onnxscript: Any = importlib.import_module("onnxscript")
        self.op = onnxscript.opset18  # its functions record a node each
        self.op19 = onnxscript.opset19  # which brought casts to float8
        self.qdq = qdq

    # ---- operators ----

    def choose_qparams(
        self, x: _Value, block_size: Any, q_min: int, q_max: int, eps: float, symmetric: bool,
        include_zero: bool = False,
    ) -> Any:  # fmt: skip
        self._version_1(x, q_min, q_max)
        f = OF_NAME["int8"]
        return self._choose(x, block_size, q_min, q_max, eps, symmetric, f, include_zero)

    def choose_qparams_format(
        self, x: _Value, block_size: Any, q_min: int, q_max: int, eps: float, symmetric: bool,
        format: str, include_zero: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        f = self._format(format)
        rest = self._rule(options)
        return self._choose(x, block_size, q_min, q_max, eps, symmetric, f, include_zero, **rest)

    def quantize(
        self, x: _Value, scale: _Value, zero_point: _Value, q_min: int, q_max: int, dtype: int
    ) -> Any:
        self._version_1(x, q_min, q_max, scale, zero_point)
        f = _of_number(dtype)
        return self._codes(x, scale, zero_point, q_min, q_max, f, None, None, False)

    def quantize_format(
        self, x: _Value, scale: _Value, zero_point: _Value, q_min: int, q_max: int, format: str,
        block_size: Any = None, global_scale: _Value = None, round_first: bool = False,
        **options: Any,
    ) -> Any:  # fmt: skip
        self._no_seed(options)
        f = self._format(format)
        scale = self._scaled(scale, global_scale)
        return self._codes(x, scale, zero_point, q_min, q_max, f, block_size, None, round_first)

    def dequantize(self, q: _Value, scale: _Value, zero_point: _Value) -> Any:
        self._no_doubles(scale, zero_point)
        f = next((f for f in OF_NAME.values() if f.dtype == _dtype(q)), None)
        return self._numbers(q, scale, zero_point, f, None, _sizes(q))

    def dequantize_format(
        self, q: _Value, scale: _Value, zero_point: _Value, format: str, block_size: Any = None,
        global_scale: _Value = None, output_dtype: int | None = None,
    ) -> Any:  # fmt: skip
        f = self._format(format)
        scale = self._scaled(scale, global_scale)
        sizes = _sizes(q)
        if f.per_byte > 1 and sizes[-1] is not None:
            sizes[-1] *= f.per_byte
        y = self._numbers(q, scale, zero_point, f, block_size, sizes)
        return y if output_dtype in (None, -1) else self.op.Cast(y, to=int(output_dtype))

    def dynamic_quantize(
        self, x: _Value, block_size: Any, q_min: int, q_max: int, eps: float, symmetric: bool,
        dtype: int, include_zero: bool = False,
    ) -> Any:  # fmt: skip
        self._version_1(x, q_min, q_max)
        f = _of_number(dtype)
        p = self._choose(x, block_size, q_min, q_max, eps, symmetric, f, include_zero)
        zeros = "none" if symmetric else None
        return self._codes(x, *p, q_min, q_max, f, block_size, zeros, False), *p

    def dynamic_quantize_format(
        self, x: _Value, block_size: Any, q_min: int, q_max: int, eps: float, symmetric: bool,
        format: str, include_zero: bool = False, global_scale: _Value = None,
        round_first: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        rest = self._rule({"global_scale": global_scale, **self._no_seed(options)})
        f = self._format(format)
        p = self._choose(x, block_size, q_min, q_max, eps, symmetric, f, include_zero, **rest)
        scale = self._scaled(p[0], global_scale)
        zeros = "none" if symmetric else None
        return (
            self._codes(x, scale, p[1], q_min, q_max, f, block_size, zeros, round_first),
            *p,
        )

    def quantize_dequantize(
        self, x: _Value, block_size: Any, q_min: int, q_max: int, eps: float, symmetric: bool,
        dtype: int, include_zero: bool = False,
    ) -> Any:  # fmt: skip
        q, *p = self.dynamic_quantize(
            x, block_size, q_min, q_max, eps, symmetric, dtype, include_zero
        )
        f = _of_number(dtype)
        return q, self._numbers(q, p[0], p[1], f, block_size, _sizes(x)), *p

    def quantize_dequantize_format(
        self, x: _Value, block_size: Any, q_min: int, q_max: int, eps: float, symmetric: bool,
        format: str, output_dtype: int | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        q, *p = self.dynamic_quantize_format(
            x, block_size, q_min, q_max, eps, symmetric, format, **options
        )
        scale = self._scaled(p[0], options.get("global_scale"))
        y = self._numbers(q, scale, p[1], OF_NAME[format], block_size, _sizes(x))
        return q, y if output_dtype in (None, -1) else self.op.Cast(y, to=int(output_dtype)), *p

    def fake_quantize(
        self, x: _Value, scale: _Value, zero_point: _Value, q_min: int, q_max: int
    ) -> Any:
        self._version_1(x, q_min, q_max, scale, zero_point)
        names = ("int8", "uint8", "int16")
        f = next(OF_NAME[n] for n in names if OF_NAME[n].holds(q_min, q_max))
        return self._fake(x, scale, zero_point, q_min, q_max, f, None, False)

    def fake_quantize_format(
        self, x: _Value, scale: _Value, zero_point: _Value, q_min: int, q_max: int, format: str,
        block_size: Any = None, global_scale: _Value = None, round_first: bool = False,
        **options: Any,
    ) -> Any:  # fmt: skip
        self._no_seed(options)
        f = self._format(format)
        scale = self._scaled(scale, global_scale)
        return self._fake(x, scale, zero_point, q_min, q_max, f, block_size, round_first)

    def aminmax(self, x: _Value, block_size: Any) -> Any:
        if _dtype(x) != torch.float32:
            raise _unsupported("aminmax of", _dtype(x))
        return self._extremes(x, x, block_size)

    def linear_w8a8(self, x: _Value, q: _Value, scale: _Value, bias: _Value = None) -> Any:
        """Sums are exact: integers in float64, so that no kernel's order or saturation shows."""
        blocks = [1] * (len(x.shape) - 1) + [-1]
        f = OF_NAME["int8"]
        x_scale, _ = self._choose(x, blocks, -128, 127, 1e-8, True, f, False)
        codes = self._rounded(self._quotient(x, x_scale, blocks), None, f, -128, 127, False)
        weight = self.op.Transpose(self._cast(q, torch.float64), perm=[1, 0])
        product = self.op.MatMul(self._cast(codes, torch.float64), weight)
        y = self.op.Mul(self._cast(product, torch.float32), x_scale)
        y = self.op.Mul(y, self.op.Reshape(self._float(scale), self._ints(-1)))
        if bias is not None:
            y = self.op.Add(y, self._float(bias))
        return self._cast(y, _dtype(x))

    def view(self, v: _Value, dtype: int) -> Any:
        """Bytes as float8: no operator has its bits, so a table has the numbers of all codes."""
        to = _DTYPES.get(int(dtype))
        if to == _dtype(v):
            return self.op.Identity(v)
        if _dtype(v) != torch.uint8 or to not in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise _unsupported(f"a view of {_dtype(v)} as", to)
        numbers = torch.arange(256, dtype=torch.uint8).view(to).to(torch.float32)
        table = self.op.Constant(value_floats=numbers.tolist())
        found = self.op.Gather(table, self._cast(v, torch.int64))
        return _shaped(self.op19.Cast(found, to=_NUMBERS[to]), _sizes(v), v)

    # ---- what is refused ----

    def _version_1(self, x: _Value, q_min: int, q_max: int, *parameters: _Value) -> None:
        half = _dtype(x) in (torch.float16, torch.bfloat16) and q_min >= -128 and q_max <= 255
        if half or _dtype(x) == torch.float64:
            what = "version 1's steps (pass compute_dtype=torch.float32) of"
            raise _unsupported(what, _dtype(x))
        self._no_doubles(*parameters)

    def _no_doubles(self, *parameters: _Value) -> None:
        for p in parameters:
            if _dtype(p) == torch.float64 and len(p.shape) > 0:
                raise _unsupported("version 1's steps with parameters of", torch.float64)

    def _no_seed(self, options: dict[str, Any]) -> dict[str, Any]:
        if options.pop("seed", None) is not None:
            raise _unsupported("stochastic rounding", "by a seed")
        options.pop("index", None)
        return options

    def _rule(self, options: dict[str, Any]) -> dict[str, Any]:
        dtype, rule = options.get("scale_dtype"), options.get("scale_rule")
        if dtype not in (None, -1, _NUMBERS[torch.float32]):
            raise _unsupported("scale_dtype", dtype)
        if rule not in (None, "half_range"):
            raise _unsupported("scale_rule", rule)
        return {"rule": rule, "global_scale": options.get("global_scale")}

    def _format(self, name: str) -> Format:
        f = OF_NAME[name]
        if not f.has_zero_point and f.bits != 8:
            raise _unsupported("the format", name)
        return f

    # ---- steps ----

    def _cast(self, v: _Value, dtype: torch.dtype | None) -> _Value:
        if dtype is None or _dtype(v) == dtype:
            return v
        return self.op.Cast(v, to=_NUMBERS[dtype])

    def _float(self, v: _Value) -> _Value:
        if _dtype(v) in (torch.float8_e8m0fnu, torch.float8_e4m3fn):
            raise _unsupported("scales of", _dtype(v))
        return self._cast(v, torch.float32)

    def _constant(self, number: float) -> _Value:
        return self.op.Constant(value_float=float(number))

    def _ints(self, *numbers: int) -> _Value:
        return self.op.Constant(value_ints=list(numbers))

    def _scaled(self, scale: _Value, global_scale: _Value) -> _Value:
        if global_scale is None:
            return scale
        if len(global_scale.shape) > 0:
            raise _unsupported("global_scale of the shape", global_scale.shape)
        product = self.op.Mul(self._float(scale), self._float(global_scale))
        return _shaped(product, _sizes(scale), scale)

    def _size(self, v: _Value, dim: int) -> _Value:
        return self.op.Gather(self.op.Shape(v), self._ints(dim))  # of shape (1,)

    def _spread(self, p: _Value, x: _Value, block_size: Any, sizes: list[int | None]) -> _Value:
        """A parameter in a shape that broadcasts with x: index i // block of each dimension."""
        there = _sizes(p)
        p = self._float(p)
        if len(there) != len(sizes):
            return p
        for d, (n, s) in enumerate(zip(sizes, there, strict=True)):
            block = -1 if block_size is None else block_size[d]
            one = isinstance(block, int) and block == 1
            if s == 1 or one or (s is not None and s == n):
                continue
            if isinstance(block, int) and block == -1:
                if block_size is not None:
                    continue
                if n is None and s is None:
                    continue  # the same symbol, or torch would have said so
                if n is None or s is None:
                    block = self.op.Div(self._size(x, d), self._size(p, d))
                else:
                    block = n // s
            block = self._ints(block) if isinstance(block, int) else block
            zero, step = (self.op.Constant(value_int=i) for i in (0, 1))
            end = self.op.Squeeze(self._size(x, d))
            index = self.op.Div(self.op.Range(zero, end, step), block)
            p = self.op.Gather(p, index, axis=d)
        return p

    def _blocks(
        self, of: _Value, block_size: Any
    ) -> tuple[Callable[[str, _Value], _Value], list[Any]]:
        """How ReduceMax and ReduceMin go over blocks of what has the shape of `of`; the sizes then."""
        op = self.op
        if block_size is None:
            return lambda name, t: getattr(op, name)(t, keepdims=0), []
        target: list[Any] = []
        parts: list[Any] = []  # the sizes of what results
        pads: list[Any] = []
        axes: list[int] = []
        for d, (n, block) in enumerate(zip(_sizes(of), block_size, strict=True)):
            if isinstance(block, int) and (block == -1 or (n is not None and block >= n)):
                axes.append(len(target))
                target.append(self._size(of, d) if n is None else n)
                parts.append(1)
                pads.append(0)
            elif isinstance(block, int) and block == 1:
                target.append(self._size(of, d) if n is None else n)
                parts.append(target[-1])
                pads.append(0)
            else:
                if isinstance(block, int) and n is not None:
                    count: Any = -(-n // block)
                    pads.append(count * block - n)
                else:
                    size = self._size(of, d)
                    block = self._ints(block) if isinstance(block, int) else block
                    up = op.Sub(op.Add(size, block), self._ints(1))
                    count = op.Div(up, block)
                    pads.append(op.Sub(op.Mul(count, block), size))
                target += [count, block]
                parts.append(count)
                axes.append(len(target) - 1)
        is_cut = len(target) > len(parts)

        def reduce(name: str, t: _Value) -> _Value:
            if any(not isinstance(p, int) or p for p in pads):  # a repeated element changes nothing
                before = self._ints(*[0] * len(pads))
                t = op.Pad(t, op.Concat(before, self._dims(pads), axis=0), mode="edge")
            if is_cut:
                t = op.Reshape(t, self._dims(target))
            if axes:
                t = getattr(op, name)(t, self._ints(*axes), keepdims=1)
            return op.Reshape(t, self._dims(parts)) if is_cut else t

        return reduce, parts

    def _dims(self, sizes: Sequence[Any]) -> _Value:
        if all(isinstance(n, int) for n in sizes):
            return self._ints(*sizes)
        parts = [self._ints(n) if isinstance(n, int) else n for n in sizes]
        parts = [self.op.Reshape(p, self._ints(1)) for p in parts]
        return self.op.Concat(*parts, axis=0)

    def _extremes(self, x: _Value, of: _Value, block_size: Any) -> tuple[_Value, _Value]:
        """Both are NaN where a block has a NaN, which ONNX's reductions may lose."""
        op = self.op
        reduce, sizes = self._blocks(of, block_size)
        is_nan = op.IsNaN(x)
        known = op.Where(is_nan, self._constant(0.0), x)
        lost = reduce("ReduceMax", op.Cast(is_nan, to=_NUMBERS[torch.float32]))
        has_nan, nan = op.Greater(lost, self._constant(0.0)), self._constant(float("nan"))
        low, high = (reduce(name, known) for name in ("ReduceMin", "ReduceMax"))
        low, high = (op.Where(has_nan, nan, t) for t in (low, high))
        return _shaped(low, sizes, of), _shaped(high, sizes, of)

    def _choose(
        self, of: _Value, block_size: Any, q_min: int, q_max: int, eps: float, symmetric: bool,
        f: Format, include_zero: bool, rule: str | None = None, global_scale: _Value = None,
    ) -> tuple[_Value, _Value]:  # fmt: skip
        op = self.op
        x = low = self._float(of)
        if symmetric:
            _, width = self._extremes(op.Abs(x), of, block_size)
            divisor: float = max(q_max - q_min, 1) / 2 if rule else max(q_max, 1)
        else:
            low, high = self._extremes(x, of, block_size)
            if include_zero:
                sizes = _sizes(low)
                low, high = (
                    _shaped(op.Where(op.IsNaN(t), t, limited(t, self._constant(0.0))), sizes, of)
                    for t, limited in ((low, op.Min), (high, op.Max))
                )
            width = _shaped(op.Sub(high, low), _sizes(low), of)
            divisor = max(q_max - q_min, 1)
        scale = op.Div(width, self._constant(divisor))
        if global_scale is not None:
            scale = op.Div(scale, self._float(global_scale))
        scale = op.Where(op.IsNaN(scale), scale, op.Max(scale, self._constant(eps)))
        if symmetric:
            zero = self._constant(0.0)
            zero = op.Expand(zero, op.Shape(scale)) if f.has_zero_point else op.Identity(zero)
        else:
            zero = op.Sub(self._constant(q_min), op.Round(op.Div(low, scale)))
            zero = op.Where(op.IsNaN(zero), zero, self._clipped(zero, q_min, q_max))
        sizes = _sizes(width)
        return _shaped(scale, sizes, of), _shaped(zero, sizes if f.has_zero_point else [], of)

    def _clipped(self, v: _Value, q_min: int, q_max: int) -> _Value:
        return self.op.Clip(v, self._constant(q_min), self._constant(q_max))

    def _quotient(self, x: _Value, scale: _Value, block_size: Any) -> _Value:
        return self.op.Div(self._float(x), self._spread(scale, x, block_size, _sizes(x)))

    def _rounded(
        self, v: _Value, zero_point: _Value, f: Format, q_min: int, q_max: int, round_first: bool
    ) -> _Value:
        """The quotient as a code: int32, or float8."""
        op = self.op
        if not f.has_zero_point:
            v = op.Where(op.IsNaN(v), self._constant(float("nan")), v)  # one NaN, without a sign
            known = op.Where(op.IsNaN(v), v, self._clipped(v, q_min, q_max))
            return self.op19.Cast(known, to=_NUMBERS[f.dtype], saturate=1)
        if round_first:
            v = op.Round(v)
        if zero_point is not None:
            v = op.Add(v, zero_point)
        v = op.Where(op.IsNaN(v), self._constant(0.0), v)
        return op.Cast(self._clipped(op.Round(v), q_min, q_max), to=_NUMBERS[torch.int32])

    def _codes(
        self, x: _Value, scale: _Value, zero_point: _Value, q_min: int, q_max: int, f: Format,
        block_size: Any, zeros: str | None, round_first: bool,
    ) -> _Value:  # fmt: skip
        if zeros or not f.has_zero_point:
            zero_point = None
        linear = self._linear(x, scale, zero_point, f, block_size, round_first)
        if linear and (q_min, q_max) == (f.low, f.high):
            scale, zero, axis = linear
            q = self.op.QuantizeLinear(self._float(x), scale, zero, axis=axis)
            return _shaped(q, _sizes(x), x)
        v = self._quotient(x, scale, block_size)
        if zero_point is not None:
            zero_point = self._spread(zero_point, x, block_size, _sizes(x))
        codes = self._rounded(v, zero_point, f, q_min, q_max, round_first)
        sizes = _sizes(x)
        if f.per_byte > 1:
            last = None if sizes[-1] is None else sizes[-1] // f.per_byte
            return _shaped(self._packed(codes, f), [*sizes[:-1], last], x)
        return _shaped(self._stored(codes, f), sizes, x)

    def _stored(self, codes: _Value, f: Format) -> _Value:
        return self.op.Cast(codes, to=_NUMBERS[f.dtype]) if f.has_zero_point else codes

    def _packed(self, codes: _Value, f: Format) -> _Value:
        """Codes of the last dimension, the first in the lowest bits."""
        op = self.op
        codes = op.Mod(op.Add(codes, self._int32(2**f.bits)), self._int32(2**f.bits))
        whole = None
        for k in range(f.per_byte):
            end = self._ints(2**62)
            part = op.Slice(codes, self._ints(k), end, self._ints(-1), self._ints(f.per_byte))
            part = op.Mul(part, self._int32(2 ** (k * f.bits)))
            whole = part if whole is None else op.Add(whole, part)
        return op.Cast(whole, to=_NUMBERS[torch.uint8])

    def _unpacked(self, q: _Value, f: Format) -> _Value:
        op = self.op
        rank = len(q.shape)
        codes = op.Cast(q, to=_NUMBERS[torch.int32])
        parts = []
        for k in range(f.per_byte):
            part = op.Mod(op.Div(codes, self._int32(2 ** (k * f.bits))), self._int32(2**f.bits))
            parts.append(op.Unsqueeze(part, self._ints(rank)))
        codes = op.Reshape(op.Concat(*parts, axis=-1), self._ints(*[0] * (rank - 1), -1))
        if f.low < 0:
            negative = op.GreaterOrEqual(codes, self._int32(2 ** (f.bits - 1)))
            codes = op.Where(negative, op.Sub(codes, self._int32(2**f.bits)), codes)
        return codes

    def _int32(self, number: int) -> _Value:
        return self.op.Cast(self.op.Constant(value_int=number), to=_NUMBERS[torch.int32])

    def _numbers(
        self, q: _Value, scale: _Value, zero_point: _Value, f: Format | None, block_size: Any,
        sizes: list[int | None],
    ) -> _Value:  # fmt: skip
        op = self.op
        if f is None or f.has_zero_point:
            linear = f and self._linear(q, scale, zero_point, f, block_size, True, sizes)
            if linear:
                return op.DequantizeLinear(q, linear[0], linear[1], axis=linear[2])
        else:
            zero_point = None
        codes = self._unpacked(q, f) if f and f.per_byte > 1 else q
        v = op.Cast(codes, to=_NUMBERS[torch.float32])
        if zero_point is not None:
            v = op.Sub(v, self._spread(zero_point, v, block_size, sizes))
        return op.Mul(v, self._spread(scale, v, block_size, sizes))

    def _fake(
        self, x: _Value, scale: _Value, zero_point: _Value, q_min: int, q_max: int, f: Format,
        block_size: Any, round_first: bool,
    ) -> _Value:  # fmt: skip
        op, sizes = self.op, _sizes(x)
        if not f.has_zero_point:
            zero_point = None
        linear = self._linear(x, scale, zero_point, f, block_size, round_first)
        dtype = _dtype(x) if _dtype(x).is_floating_point else torch.float32
        if linear and (q_min, q_max) == (f.low, f.high):
            s, zero, axis = linear
            q = op.QuantizeLinear(self._float(x), s, zero, axis=axis)
            y = op.DequantizeLinear(q, s, zero, axis=axis)
        else:
            v = self._quotient(x, scale, block_size)
            if zero_point is not None:
                zero_point = self._spread(zero_point, x, block_size, sizes)
            codes = self._rounded(v, zero_point, f, q_min, q_max, round_first)
            y = op.Cast(codes, to=_NUMBERS[torch.float32])
            if zero_point is not None:
                y = op.Sub(y, zero_point)
            y = op.Mul(y, self._spread(scale, x, block_size, sizes))
        return y if dtype == torch.float32 else op.Cast(y, to=_NUMBERS[dtype])

    def _linear(
        self, x: _Value, scale: _Value, zero_point: _Value, f: Format, block_size: Any,
        any_zero_point: bool, sizes: list[int | None] | None = None,
    ) -> tuple[_Value, _Value, int] | None:  # fmt: skip
        """Scale, zero point and axis of QuantizeLinear, where it has quantkit's bits."""
        if not self.qdq or f.name not in ("int8", "uint8") or scale.shape is None:
            return None
        if zero_point is not None and not any_zero_point:
            return None
        sizes = _sizes(x) if sizes is None else sizes
        there = _sizes(scale)
        cut = [d for d, s in enumerate(there) if s != 1]
        if len(cut) > 1 or (cut and (len(there) != len(sizes) or there[cut[0]] != sizes[cut[0]])):
            return None
        if cut and there[cut[0]] is None:
            return None
        axis = cut[0] if cut else 0
        shape = self._ints(-1) if cut else self.op.Constant(value_ints=[])
        scale = self.op.Reshape(self._float(scale), shape)
        number = _NUMBERS[f.dtype]
        if zero_point is None:
            zero = self.op.Cast(self.op.Mul(scale, self._constant(0.0)), to=number)
        elif _sizes(zero_point) == there:
            zero = self.op.Cast(self.op.Reshape(self._float(zero_point), shape), to=number)
        else:
            shape = self.op.Shape(scale)
            zero = self.op.Expand(self.op.Reshape(self._float(zero_point), self._ints(-1)), shape)
            zero = self.op.Cast(zero, to=number)
        return scale, zero, axis


# ---- what the exporter knows of a value ----------------------------------------------------------------


def _sizes(v: _Value) -> list[int | None]:
    """Sizes that are fixed, and None for others."""
    return [n if isinstance(n, int) else None for n in v.shape]


# ONNX's numbers of dtypes: TensorProto.DataType.
_NUMBERS = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.uint16: 4, torch.int16: 5, torch.int32: 6,
    torch.int64: 7, torch.bool: 9, torch.float16: 10, torch.float64: 11, torch.uint32: 12,
    torch.uint64: 13, torch.bfloat16: 16, torch.float8_e4m3fn: 17, torch.float8_e5m2: 19,
}  # fmt: skip
_DTYPES = {number: dtype for dtype, number in _NUMBERS.items()}


def _dtype(v: _Value) -> Any:
    """Of a value that the exporter knows; None of one that is made here."""
    return None if v is None or v.dtype is None else _DTYPES.get(int(v.dtype), v.dtype)


def _shaped(v: _Value, sizes: Sequence[Any], like: _Value) -> _Value:
    """v, of which these sizes are known."""
    v.shape = type(like.shape)([n if isinstance(n, int) else None for n in sizes])
    return v


def _of_number(number: int) -> Format:
    """The format of version 1 with this dtype."""
    return next(
        f for f in OF_NAME.values() if f.number is not None and _NUMBERS[f.dtype] == int(number)
    )
