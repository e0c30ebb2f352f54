"""The steps of the operators in nodes of ONNX; numbers are float32 on the way."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..formats import Format
from .values import NUMBERS, Value, dtype_of, shaped, sizes_of, unsupported


class Steps:
    """Writes steps into the graph that is being made."""

    def __init__(self, qdq: bool) -> None:
        onnxscript: Any = importlib.import_module("onnxscript")
        self.op = onnxscript.opset18  # its functions record a node each
        self.op19 = onnxscript.opset19  # which brought casts to float8
        self.qdq = qdq

    def _cast(self, v: Value, dtype: torch.dtype | None) -> Value:
        if dtype is None or dtype_of(v) == dtype:
            return v
        return self.op.Cast(v, to=NUMBERS[dtype])

    def _float(self, v: Value) -> Value:
        if dtype_of(v) in (torch.float8_e8m0fnu, torch.float8_e4m3fn):
            raise unsupported("scales of", dtype_of(v))
        return self._cast(v, torch.float32)

    def _constant(self, number: float) -> Value:
        return self.op.Constant(value_float=float(number))

    def _ints(self, *numbers: int) -> Value:
        return self.op.Constant(value_ints=list(numbers))

    def _scaled(self, scale: Value, global_scale: Value) -> Value:
        if global_scale is None:
            return scale
        if len(global_scale.shape) > 0:
            raise unsupported("global_scale of the shape", global_scale.shape)
        product = self.op.Mul(self._float(scale), self._float(global_scale))
        return shaped(product, sizes_of(scale), scale)

    def _size(self, v: Value, dim: int) -> Value:
        return self.op.Gather(self.op.Shape(v), self._ints(dim))  # of shape (1,)

    def _spread(self, p: Value, x: Value, block_size: Any, sizes: list[int | None]) -> Value:
        """A parameter in a shape that broadcasts with x: index i // block of each dimension."""
        there = sizes_of(p)
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
        self, of: Value, block_size: Any
    ) -> tuple[Callable[[str, Value], Value], list[Any]]:
        """How ReduceMax and ReduceMin go over blocks of what has the shape of `of`; the sizes then."""
        op = self.op
        if block_size is None:
            return lambda name, t: getattr(op, name)(t, keepdims=0), []
        target: list[Any] = []
        parts: list[Any] = []  # the sizes of what results
        pads: list[Any] = []
        axes: list[int] = []
        for d, (n, block) in enumerate(zip(sizes_of(of), block_size, strict=True)):
            fixed = isinstance(block, int)
            whole = fixed and (block == -1 or (n is not None and block >= n))
            if whole or (fixed and block == 1):
                axes += [len(target)] if whole else []
                target.append(self._size(of, d) if n is None else n)
                parts.append(1 if whole else target[-1])
                pads.append(0)
            else:
                if fixed and n is not None:
                    count: Any = -(-n // block)
                    pads.append(count * block - n)
                else:
                    size = self._size(of, d)
                    block = self._ints(block) if fixed else block
                    up = op.Sub(op.Add(size, block), self._ints(1))
                    count = op.Div(up, block)
                    pads.append(op.Sub(op.Mul(count, block), size))
                target += [count, block]
                parts.append(count)
                axes.append(len(target) - 1)
        is_cut = len(target) > len(parts)

        def reduce(name: str, t: Value) -> Value:
            if any(not isinstance(p, int) or p for p in pads):  # a repeated element changes nothing
                before = self._ints(*[0] * len(pads))
                t = op.Pad(t, op.Concat(before, self._dims(pads), axis=0), mode="edge")
            if is_cut:
                t = op.Reshape(t, self._dims(target))
            if axes:
                t = getattr(op, name)(t, self._ints(*axes), keepdims=1)
            return op.Reshape(t, self._dims(parts)) if is_cut else t

        return reduce, parts

    def _dims(self, sizes: Sequence[Any]) -> Value:
        if all(isinstance(n, int) for n in sizes):
            return self._ints(*sizes)
        parts = [self._ints(n) if isinstance(n, int) else n for n in sizes]
        parts = [self.op.Reshape(p, self._ints(1)) for p in parts]
        return self.op.Concat(*parts, axis=0)

    def _extremes(self, x: Value, of: Value, block_size: Any) -> tuple[Value, Value]:
        """Both are NaN where a block has a NaN, which ONNX's reductions may lose."""
        op = self.op
        reduce, sizes = self._blocks(of, block_size)
        is_nan = op.IsNaN(x)
        known = op.Where(is_nan, self._constant(0.0), x)
        lost = reduce("ReduceMax", op.Cast(is_nan, to=NUMBERS[torch.float32]))
        has_nan, nan = op.Greater(lost, self._constant(0.0)), self._constant(float("nan"))
        low, high = (reduce(name, known) for name in ("ReduceMin", "ReduceMax"))
        low, high = (op.Where(has_nan, nan, t) for t in (low, high))
        return shaped(low, sizes, of), shaped(high, sizes, of)

    def _choose(
        self, of: Value, block_size: Any, q_min: int, q_max: int, eps: float, symmetric: bool,
        f: Format, include_zero: bool, rule: str | None = None, global_scale: Value = None,
    ) -> tuple[Value, Value]:  # fmt: skip
        op = self.op
        x = low = self._float(of)
        if symmetric:
            _, width = self._extremes(op.Abs(x), of, block_size)
            divisor: float = max(q_max - q_min, 1) / 2 if rule else max(q_max, 1)
        else:
            low, high = self._extremes(x, of, block_size)
            if include_zero:
                sizes = sizes_of(low)
                low, high = (
                    shaped(op.Where(op.IsNaN(t), t, limited(t, self._constant(0.0))), sizes, of)
                    for t, limited in ((low, op.Min), (high, op.Max))
                )
            width = shaped(op.Sub(high, low), sizes_of(low), of)
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
        sizes = sizes_of(width)
        return shaped(scale, sizes, of), shaped(zero, sizes if f.has_zero_point else [], of)

    def _clipped(self, v: Value, q_min: int, q_max: int) -> Value:
        return self.op.Clip(v, self._constant(q_min), self._constant(q_max))

    def _rounded(
        self, x: Value, scale: Value, zero_point: Value, q_min: int, q_max: int, f: Format,
        block_size: Any, round_first: bool,
    ) -> tuple[Value, Value]:  # fmt: skip
        """Codes, int32 or float8, and the zero point as it is added to each."""
        op, sizes = self.op, sizes_of(x)
        v = op.Div(self._float(x), self._spread(scale, x, block_size, sizes))
        if not f.has_zero_point:
            v = op.Where(op.IsNaN(v), self._constant(float("nan")), v)  # one NaN, without a sign
            known = op.Where(op.IsNaN(v), v, self._clipped(v, q_min, q_max))
            return self.op19.Cast(known, to=NUMBERS[f.dtype], saturate=1), None
        if zero_point is not None:
            zero_point = self._spread(zero_point, x, block_size, sizes)
        if round_first:
            v = op.Round(v)
        if zero_point is not None:
            v = op.Add(v, zero_point)
        v = op.Where(op.IsNaN(v), self._constant(0.0), v)
        v = op.Cast(self._clipped(op.Round(v), q_min, q_max), to=NUMBERS[torch.int32])
        return v, zero_point

    def _codes(
        self, x: Value, scale: Value, zero_point: Value, q_min: int, q_max: int, f: Format,
        block_size: Any, round_first: bool,
    ) -> Value:  # fmt: skip
        linear = self._linear(x, scale, zero_point, f, block_size, round_first)
        if linear and (q_min, q_max) == (f.low, f.high):
            scale, zero, axis = linear
            q = self.op.QuantizeLinear(self._float(x), scale, zero, axis=axis)
            return shaped(q, sizes_of(x), x)
        codes, _ = self._rounded(x, scale, zero_point, q_min, q_max, f, block_size, round_first)
        sizes = sizes_of(x)
        if f.per_byte > 1:
            last = None if sizes[-1] is None else sizes[-1] // f.per_byte
            return shaped(self._packed(codes, f), [*sizes[:-1], last], x)
        if f.has_zero_point:
            codes = self.op.Cast(codes, to=NUMBERS[f.dtype])
        return shaped(codes, sizes, x)

    def _packed(self, codes: Value, f: Format) -> Value:
        """Codes of the last dimension, the first in the lowest bits."""
        op = self.op
        codes = op.Mod(op.Add(codes, self._int32(2**f.bits)), self._int32(2**f.bits))
        whole = None
        for k in range(f.per_byte):
            end = self._ints(2**62)
            part = op.Slice(codes, self._ints(k), end, self._ints(-1), self._ints(f.per_byte))
            part = op.Mul(part, self._int32(2 ** (k * f.bits)))
            whole = part if whole is None else op.Add(whole, part)
        return op.Cast(whole, to=NUMBERS[torch.uint8])

    def _unpacked(self, q: Value, f: Format) -> Value:
        op = self.op
        rank = len(q.shape)
        codes = op.Cast(q, to=NUMBERS[torch.int32])
        parts = []
        for k in range(f.per_byte):
            part = op.Mod(op.Div(codes, self._int32(2 ** (k * f.bits))), self._int32(2**f.bits))
            parts.append(op.Unsqueeze(part, self._ints(rank)))
        codes = op.Reshape(op.Concat(*parts, axis=-1), self._ints(*[0] * (rank - 1), -1))
        if f.low < 0:
            negative = op.GreaterOrEqual(codes, self._int32(2 ** (f.bits - 1)))
            codes = op.Where(negative, op.Sub(codes, self._int32(2**f.bits)), codes)
        return codes

    def _int32(self, number: int) -> Value:
        return self.op.Cast(self.op.Constant(value_int=number), to=NUMBERS[torch.int32])

    def _numbers(
        self, q: Value, scale: Value, zero_point: Value, f: Format | None, block_size: Any,
        sizes: list[int | None],
    ) -> Value:  # fmt: skip
        op = self.op
        if f is None or f.has_zero_point:
            linear = f and self._linear(q, scale, zero_point, f, block_size, True, sizes)
            if linear:
                return op.DequantizeLinear(q, linear[0], linear[1], axis=linear[2])
        else:
            zero_point = None
        codes = self._unpacked(q, f) if f and f.per_byte > 1 else q
        v = op.Cast(codes, to=NUMBERS[torch.float32])
        if zero_point is not None:
            v = op.Sub(v, self._spread(zero_point, v, block_size, sizes))
        return op.Mul(v, self._spread(scale, v, block_size, sizes))

    def _fake(
        self, x: Value, scale: Value, zero_point: Value, q_min: int, q_max: int, f: Format,
        block_size: Any, round_first: bool,
    ) -> Value:  # fmt: skip
        op, sizes = self.op, sizes_of(x)
        linear = self._linear(x, scale, zero_point, f, block_size, round_first)
        dtype = dtype_of(x) if dtype_of(x).is_floating_point else torch.float32
        if linear and (q_min, q_max) == (f.low, f.high):
            s, zero, axis = linear
            q = op.QuantizeLinear(self._float(x), s, zero, axis=axis)
            y = op.DequantizeLinear(q, s, zero, axis=axis)
        else:
            codes, zero_point = self._rounded(
                x, scale, zero_point, q_min, q_max, f, block_size, round_first
            )
            y = op.Cast(codes, to=NUMBERS[torch.float32])
            if zero_point is not None:
                y = op.Sub(y, zero_point)
            y = op.Mul(y, self._spread(scale, x, block_size, sizes))
        return y if dtype == torch.float32 else op.Cast(y, to=NUMBERS[dtype])

    def _linear(
        self, x: Value, scale: Value, zero_point: Value, f: Format, block_size: Any,
        any_zero_point: bool, sizes: list[int | None] | None = None,
    ) -> tuple[Value, Value, int] | None:  # fmt: skip
        """Scale, zero point and axis of QuantizeLinear, where it has quantkit's bits."""
        if not self.qdq or f.name not in ("int8", "uint8") or scale.shape is None:
            return None
        if zero_point is not None and not any_zero_point:
            return None
        sizes = sizes_of(x) if sizes is None else sizes
        there = sizes_of(scale)
        cut = [d for d, s in enumerate(there) if s != 1]
        if len(cut) > 1 or (cut and (len(there) != len(sizes) or there[cut[0]] != sizes[cut[0]])):
            return None
        if cut and there[cut[0]] is None:
            return None
        axis = cut[0] if cut else 0
        shape = self._ints(-1) if cut else self.op.Constant(value_ints=[])
        scale = self.op.Reshape(self._float(scale), shape)
        if zero_point is None:
            zero = self.op.Mul(scale, self._constant(0.0))
        elif sizes_of(zero_point) == there:
            zero = self.op.Reshape(self._float(zero_point), shape)
        else:
            shape = self.op.Shape(scale)
            zero = self.op.Expand(self.op.Reshape(self._float(zero_point), self._ints(-1)), shape)
        return scale, self.op.Cast(zero, to=NUMBERS[f.dtype]), axis
