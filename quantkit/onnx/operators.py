"""The operators by these steps, each with the arguments of its schema; calls that ONNX cannot have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..formats import OF_NAME, Format
from .steps import Steps
from .values import DTYPES, NUMBERS, Value, dtype_of, of_number, shaped, sizes_of, unsupported


class Operators(Steps):
    """Writes an operator."""

    def choose_qparams(
        self, x: Value, block_size: Any, q_min: int, q_max: int, eps: float, symmetric: bool,
        include_zero: bool = False,
    ) -> Any:  # fmt: skip
        self._version_1(x, q_min, q_max)
        f = OF_NAME["int8"]
        return self._choose(x, block_size, q_min, q_max, eps, symmetric, f, include_zero)

    def choose_qparams_format(
        self, x: Value, block_size: Any, q_min: int, q_max: int, eps: float, symmetric: bool,
        format: str, include_zero: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        f = self._format(format)
        rest = self._rule(options)
        return self._choose(x, block_size, q_min, q_max, eps, symmetric, f, include_zero, **rest)

    def quantize(
        self, x: Value, scale: Value, zero_point: Value, q_min: int, q_max: int, dtype: int
    ) -> Any:
        self._version_1(x, q_min, q_max, scale, zero_point)
        f = of_number(dtype)
        return self._codes(x, scale, zero_point, q_min, q_max, f, None, False)

    def quantize_format(self, *args: Any, **options: Any) -> Any:
        return self._given_format(self._codes, *args, **options)

    def dequantize(self, q: Value, scale: Value, zero_point: Value) -> Any:
        self._no_doubles(scale, zero_point)
        f = next((f for f in OF_NAME.values() if f.dtype == dtype_of(q)), None)
        return self._numbers(q, scale, zero_point, f, None, sizes_of(q))

    def dequantize_format(
        self, q: Value, scale: Value, zero_point: Value, format: str, block_size: Any = None,
        global_scale: Value = None, output_dtype: int | None = None,
    ) -> Any:  # fmt: skip
        f = self._format(format)
        scale = self._scaled(scale, global_scale)
        sizes = sizes_of(q)
        if f.per_byte > 1 and sizes[-1] is not None:
            sizes[-1] *= f.per_byte
        y = self._numbers(q, scale, zero_point, f, block_size, sizes)
        return self._output(y, output_dtype)

    def dynamic_quantize(
        self, x: Value, block_size: Any, q_min: int, q_max: int, eps: float, symmetric: bool,
        dtype: int, include_zero: bool = False,
    ) -> Any:  # fmt: skip
        self._version_1(x, q_min, q_max)
        f = of_number(dtype)
        p = self._choose(x, block_size, q_min, q_max, eps, symmetric, f, include_zero)
        zero_point = None if symmetric else p[1]
        return self._codes(x, p[0], zero_point, q_min, q_max, f, block_size, False), *p

    def dynamic_quantize_format(
        self, x: Value, block_size: Any, q_min: int, q_max: int, eps: float, symmetric: bool,
        format: str, include_zero: bool = False, global_scale: Value = None,
        round_first: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        rest = self._rule({"global_scale": global_scale, **self._no_seed(options)})
        f = self._format(format)
        p = self._choose(x, block_size, q_min, q_max, eps, symmetric, f, include_zero, **rest)
        scale = self._scaled(p[0], global_scale)
        zero_point = None if symmetric else p[1]
        return self._codes(x, scale, zero_point, q_min, q_max, f, block_size, round_first), *p

    def quantize_dequantize(
        self, x: Value, block_size: Any, q_min: int, q_max: int, eps: float, symmetric: bool,
        dtype: int, include_zero: bool = False,
    ) -> Any:  # fmt: skip
        q, *p = self.dynamic_quantize(
            x, block_size, q_min, q_max, eps, symmetric, dtype, include_zero
        )
        f = of_number(dtype)
        return q, self._numbers(q, p[0], p[1], f, block_size, sizes_of(x)), *p

    def quantize_dequantize_format(
        self, x: Value, block_size: Any, q_min: int, q_max: int, eps: float, symmetric: bool,
        format: str, output_dtype: int | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        q, *p = self.dynamic_quantize_format(
            x, block_size, q_min, q_max, eps, symmetric, format, **options
        )
        scale = self._scaled(p[0], options.get("global_scale"))
        y = self._numbers(q, scale, p[1], OF_NAME[format], block_size, sizes_of(x))
        return q, self._output(y, output_dtype), *p

    def fake_quantize(
        self, x: Value, scale: Value, zero_point: Value, q_min: int, q_max: int
    ) -> Any:
        self._version_1(x, q_min, q_max, scale, zero_point)
        names = ("int8", "uint8", "int16")
        f = next(OF_NAME[n] for n in names if OF_NAME[n].holds(q_min, q_max))
        return self._fake(x, scale, zero_point, q_min, q_max, f, None, False)

    def fake_quantize_format(self, *args: Any, **options: Any) -> Any:
        return self._given_format(self._fake, *args, **options)

    def _given_format(
        self, write: Callable[..., Any], x: Value, scale: Value, zero_point: Value, q_min: int,
        q_max: int, format: str, block_size: Any = None, global_scale: Value = None,
        round_first: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        self._no_seed(options)
        f = self._format(format)
        scale = self._scaled(scale, global_scale)
        return write(x, scale, zero_point, q_min, q_max, f, block_size, round_first)

    def aminmax(self, x: Value, block_size: Any) -> Any:
        if dtype_of(x) != torch.float32:
            raise unsupported("aminmax of", dtype_of(x))
        return self._extremes(x, x, block_size)

    def linear_w8a8(self, x: Value, q: Value, scale: Value, bias: Value = None) -> Any:
        """Sums are exact: integers in float64, so that no kernel's order or saturation shows."""
        blocks = [1] * (len(x.shape) - 1) + [-1]
        f = OF_NAME["int8"]
        x_scale, _ = self._choose(x, blocks, -128, 127, 1e-8, True, f, False)
        codes, _ = self._rounded(x, x_scale, None, -128, 127, f, blocks, False)
        weight = self.op.Transpose(self._cast(q, torch.float64), perm=[1, 0])
        product = self.op.MatMul(self._cast(codes, torch.float64), weight)
        y = self.op.Mul(self._cast(product, torch.float32), x_scale)
        y = self.op.Mul(y, self.op.Reshape(self._float(scale), self._ints(-1)))
        if bias is not None:
            y = self.op.Add(y, self._float(bias))
        return self._cast(y, dtype_of(x))

    def view(self, v: Value, dtype: int) -> Any:
        """Bytes as float8: no operator has its bits, so a table has the numbers of all codes."""
        to = DTYPES.get(int(dtype))
        if to == dtype_of(v):
            return self.op.Identity(v)
        if dtype_of(v) != torch.uint8 or to not in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise unsupported(f"a view of {dtype_of(v)} as", to)
        numbers = torch.arange(256, dtype=torch.uint8).view(to).to(torch.float32)
        table = self.op.Constant(value_floats=numbers.tolist())
        found = self.op.Gather(table, self._cast(v, torch.int64))
        return shaped(self.op19.Cast(found, to=NUMBERS[to]), sizes_of(v), v)

    def _output(self, y: Value, dtype: int | None) -> Value:
        return y if dtype in (None, -1) else self.op.Cast(y, to=int(dtype))

    # ---- what is refused ----

    def _version_1(self, x: Value, q_min: int, q_max: int, *parameters: Value) -> None:
        half = dtype_of(x) in (torch.float16, torch.bfloat16) and q_min >= -128 and q_max <= 255
        if half or dtype_of(x) == torch.float64:
            what = "version 1's steps (pass compute_dtype=torch.float32) of"
            raise unsupported(what, dtype_of(x))
        self._no_doubles(*parameters)

    def _no_doubles(self, *parameters: Value) -> None:
        for p in parameters:
            if dtype_of(p) == torch.float64 and len(p.shape) > 0:
                raise unsupported("version 1's steps with parameters of", torch.float64)

    def _no_seed(self, options: dict[str, Any]) -> dict[str, Any]:
        if options.pop("seed", None) is not None:
            raise unsupported("stochastic rounding", "by a seed")
        options.pop("index", None)
        return options

    def _rule(self, options: dict[str, Any]) -> dict[str, Any]:
        dtype, rule = options.get("scale_dtype"), options.get("scale_rule")
        if dtype not in (None, -1, NUMBERS[torch.float32]):
            raise unsupported("scale_dtype", dtype)
        if rule not in (None, "half_range"):
            raise unsupported("scale_rule", rule)
        return {"rule": rule, "global_scale": options.get("global_scale")}

    def _format(self, name: str) -> Format:
        f = OF_NAME[name]
        if not f.has_zero_point and f.bits != 8:
            raise unsupported("the format", name)
        return f
