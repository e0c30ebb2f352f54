"""How one weight is quantized, and which tensors of a file stand for it.

A :class:`WeightScheme` is all that is said about a weight. Its layout names the tensors:

===================== ======================================================== =====================
layout                tensors of a weight NAME                                 who loads them
===================== ======================================================== =====================
int-quantized         NAME, NAME_scale, NAME_zero_point                        compressed-tensors
pack-quantized        NAME_packed, NAME_scale, NAME_shape, NAME_zero_point     compressed-tensors
float-quantized       NAME, NAME_scale                                         compressed-tensors
mxfp8-quantized       NAME, NAME_scale                                         compressed-tensors
mxfp4-pack-quantized  NAME_packed, NAME_scale                                  compressed-tensors
nvfp4-pack-quantized  NAME_packed, NAME_scale, NAME_global_scale               compressed-tensors
deepseek              NAME, NAME_scale_inv                                     transformers, vLLM
quantkit              NAME, NAME_scale, NAME_zero_point, NAME_global_scale     quantkit
===================== ======================================================== =====================

A weight has two dimensions: N rows, one for each output channel, of K numbers. It is quantized by tiles
of whole rows. Every number that a tile makes depends on its rows alone, or on the extremes of the whole
weight, so tiles never change a byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from .._checks import shown_sizes
from ..formats import E4M3, E8M0, OF_NAME, Format
from ..ops import (
    dynamic_quantize,
    get_asymmetric_qparams,
    get_symmetric_qparams,
    quantize_tensor,
)
from ..params import QuantizationParams
from ..schemes import powers_of

#: Dtypes of the weights that can be quantized. Scales of dtype "weight" have it too.
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PACKED = ("pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized")
#: The formats of codes that each layout has.
LAYOUTS = {
    "int-quantized": ("int8",),
    "pack-quantized": ("int4", "int8"),
    "float-quantized": ("float8_e4m3fn",),
    "mxfp8-quantized": ("float8_e4m3fn",),
    "mxfp4-pack-quantized": ("float4_e2m1fn",),
    "nvfp4-pack-quantized": ("float4_e2m1fn",),
    "deepseek": ("float8_e4m3fn",),
    "quantkit": tuple(OF_NAME),
}
# Layouts whose scales are of one kind, and their block where there is one.
_FIXED: dict[str, tuple[str, tuple[int, int] | None]] = {
    "int-quantized": ("weight", None),
    "pack-quantized": ("weight", None),
    "float-quantized": ("weight", None),
    "mxfp8-quantized": ("e8m0", (1, 32)),
    "mxfp4-pack-quantized": ("e8m0", (1, 32)),
    "nvfp4-pack-quantized": ("e4m3", (1, 16)),
    "deepseek": ("float32", None),
}
# nvfp4's inputs would need calibration.
_ACTIVATIONS = {"nvfp4-pack-quantized": (False,), "deepseek": (True,), "quantkit": (False,)}
_ONE_ROW = ("int-quantized", "pack-quantized")
SCALES = ("weight", "float32", "e8m0", "e4m3")
_LARGEST = E4M3.high * 6  # of e4m3 scales and float4 codes together


class Part(NamedTuple):
    """One tensor of a file.

    rows: how many rows of the weight stand behind one index of dimension 0. 0: the tensor is about all
    of them, and every tile has the whole of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int

    def tile(self, first: int, count: int) -> tuple[int, tuple[int, ...]]:
        """Where ``count`` rows of the weight, from ``first`` on, lie: an offset in bytes, a shape."""
        if not self.rows:
            return 0, self.shape
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return first // self.rows * row_bytes, (-(-count // self.rows), *self.shape[1:])


@dataclass(frozen=True)
class WeightScheme:
    """How a weight is quantized and stored.

    Args:
        name: as a user named it, for reports.
        dtype: the format of the codes, a name of quantkit's formats.
        layout: a name of LAYOUTS.
        block: rows and numbers of a row that share a scale; -1 numbers are all. (1, -1) is a channel,
            (1, 128) a group. None: one scale for the weight.
        symmetric: False for zero points, of integer formats.
        scale: "weight" for scales in the weight's dtype, "float32", "e8m0" (powers of two), or "e4m3"
            beside a global scale.
        scale_rule: how symmetric scales are made, as in :func:`quantkit.dynamic_quantize`.
        activations: whether the layer quantizes its inputs too, as the layout's consumers do it.

    Raises:
        ValueError that names what does not fit the layout.
    """

    name: str
    dtype: str
    layout: str
    block: tuple[int, int] | None = (1, -1)
    symmetric: bool = True
    scale: str = "weight"
    scale_rule: str | None = None
    activations: bool = False

    def __post_init__(self) -> None:
        block = tuple(self.block) if isinstance(self.block, list | tuple) else self.block
        object.__setattr__(self, "block", block)
        if not isinstance(self.name, str):
            raise _wrong("name", "a str", self.name)
        self._check(LAYOUTS, "layout", "")
        of = f" for {self.layout}"
        self._check(LAYOUTS[self.layout], "dtype", of)
        f = self.format
        if block is not None and not _is_block(block):
            got = list(block) if isinstance(block, tuple) else block
            sizes = "[rows from 1 on, numbers from 1 on or -1 for all], each below 2^63"
            raise ValueError(f"block: expected {sizes}, got {shown_sizes(got)}")
        if block is not None and block[0] != 1 and self.layout in _ONE_ROW:
            raise _wrong("block", f"one row{of}", list(block))
        # Of floats only zero is in the middle, of unsigned integers it never is.
        both = (True, False) if f.has_zero_point and f.low < 0 else (not f.has_zero_point,)
        self._check(both, "symmetric", f" for {self.dtype}")
        scale, fixed = _FIXED.get(self.layout, (None, None))
        self._check(SCALES if scale is None else (scale,), "scale", of)
        if fixed is not None and block != fixed:
            raise _wrong("block", f"{list(fixed)}{of}", block and list(block))
        if block is None and self.scale in ("e8m0", "e4m3"):
            raise _wrong("block", f"two sizes for scales in {self.scale}", None)
        if block is None and self.layout == "pack-quantized" and not self.symmetric:
            raise _wrong("block", f"a channel or a group for zero points in {self.layout}", None)
        if self.scale == "e4m3" and self.dtype != "float4_e2m1fn":
            raise _wrong("dtype", "float4_e2m1fn for scales in e4m3", self.dtype)
        if self.scale == "e8m0" and not self.symmetric:
            raise _wrong("symmetric", "True for scales in e8m0", False)
        self._check((None, *self._rules()), "scale_rule", f" for {self.dtype}, {self.scale}")
        self._check(_ACTIVATIONS.get(self.layout, (True, False)), "activations", of)

    def _check(self, choices: Iterable[object], argument: str, of: str) -> None:
        got = getattr(self, argument)
        if not any(got == c and type(got) is type(c) for c in choices):
            raise _wrong(argument, f"{' or '.join(map(str, choices))}{of}", got)

    def _rules(self) -> tuple[str, ...]:
        """Names of scale rules that the codes and scales can have."""
        f = self.format
        if not self.symmetric or self.scale == "e4m3":
            return ()
        powers = powers_of(f)
        return powers if self.scale == "e8m0" or not f.has_zero_point else ("half_range", *powers)

    @property
    def format(self) -> Format:
        return OF_NAME[self.dtype]

    @property
    def whole(self) -> bool:
        """Whether quantize() needs the extremes of the whole weight, from :func:`quantkit.aminmax`."""
        return self.block is None or self.scale == "e4m3"

    @property
    def rows(self) -> int:
        """Tiles begin at multiples of so many rows."""
        height = 1 if self.block is None else self.block[0]
        if self.layout == "pack-quantized" and not self.symmetric:
            return math.lcm(height, 32 // self.format.bits)  # zero points share int32s along rows
        return height

    def why_not(self, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        """Why a weight cannot have this scheme, in words; None where it can."""
        if dtype not in WEIGHT_DTYPES:
            return f"its dtype is {str(dtype).removeprefix('torch.')}"
        if len(shape) != 2:
            return f"it is {len(shape)}-D, not 2-D"
        if min(shape) < 1:
            return "it is empty"
        if shape[1] % self.format.per_byte:
            return f"its rows have {shape[1]} numbers, which fill no whole bytes"
        short = self.layout in ("deepseek", "quantkit") or self.block is None
        for size, block in zip(shape, self.block or (), strict=False):
            if not short and block != -1 and size % block:
                return f"its size {size} is no multiple of {block}"
        return None

    # ---- files ----------------------------------------------------------------------------------------

    def parts(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Part, ...]:
        """The tensors that stand for a weight: codes first, then scales."""
        n, k = shape
        f = self.format
        if self.layout == "pack-quantized":
            parts = [Part(f"{name}_packed", (n, -(-k * f.bits // 32)), torch.int32, 1)]
        elif self.layout in PACKED:
            parts = [Part(f"{name}_packed", (n, k // f.per_byte), torch.uint8, 1)]
        else:
            parts = [Part(name, (n, k // f.per_byte), f.storage, 1)]
        height, counts = self._counts(shape)
        suffix = "scale_inv" if self.layout == "deepseek" else "scale"
        parts.append(Part(f"{name}_{suffix}", counts, self._stored_scale(dtype), height))
        if not self.symmetric:
            parts.append(Part(f"{name}_zero_point", *self._zero_points(counts, height)))
        if self.scale == "e4m3":
            parts.append(Part(f"{name}_global_scale", (1,), torch.float32, 0))
        if self.layout == "pack-quantized":
            parts.append(Part(f"{name}_shape", (2,), torch.int64, 0))
        return tuple(parts)

    def _counts(self, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """Rows behind one row of scales, and the shape of scales in a file."""
        if self.block is None:
            return 0, (1,)
        height, width = self.block
        return height, (-(-shape[0] // height), 1 if width == -1 else -(-shape[1] // width))

    def _zero_points(
        self, counts: tuple[int, ...], height: int
    ) -> tuple[tuple[int, ...], torch.dtype, int]:
        if self.layout == "pack-quantized":
            per = 32 // self.format.bits
            return (-(-counts[0] // per), counts[1]), torch.int32, height * per
        return counts, torch.int8 if self.layout == "int-quantized" else torch.int32, height

    def _scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        coded = {"e8m0": E8M0, "e4m3": E4M3.dtype, "float32": torch.float32}
        return coded.get(self.scale, dtype)

    def _stored_scale(self, dtype: torch.dtype) -> torch.dtype:
        if self.scale == "e8m0" and self.layout != "quantkit":
            return torch.uint8
        return self._scale_dtype(dtype)

    def stored(
        self, name: str, q: torch.Tensor, params: QuantizationParams, first: int,
        shape: tuple[int, ...], dtype: torch.dtype,
    ) -> Iterator[tuple[str, int, torch.Tensor]]:  # fmt: skip
        """What a tile writes: names of parts, offsets in bytes inside them, the bytes (1-D, uint8).

        q, params: of the rows from ``first`` on, by :meth:`quantize`. shape, dtype: of the whole weight.
        """
        count = q.shape[0]
        for part in self.parts(name, shape, dtype):
            offset, sizes = part.tile(first, count)
            t = self._encoded(part.name.removeprefix(name), q, params, shape)
            assert t.numel() == math.prod(sizes) and t.dtype == part.dtype, part
            yield part.name, offset, t.reshape(-1).view(torch.uint8)

    def _encoded(
        self, suffix: str, q: torch.Tensor, p: QuantizationParams, shape: tuple[int, ...]
    ) -> torch.Tensor:
        bits = self.format.bits
        if suffix in ("", "_packed"):
            return _packed(q, bits) if self.layout == "pack-quantized" else q
        if suffix == "_shape":
            return torch.tensor(shape)
        if suffix == "_global_scale":
            assert p.global_scale is not None
            return p.global_scale if self.layout == "quantkit" else 1 / p.global_scale
        if suffix == "_zero_point":
            z = p.zero_point
            if self.layout != "pack-quantized":
                return z.to(torch.int8 if self.layout == "int-quantized" else torch.int32)
            z = z.to(torch.int8).t().contiguous()
            return _packed(_pairs(z) if bits == 4 else z, bits).t()
        return (
            p.scale.view(torch.uint8)
            if self._stored_scale(p.scale.dtype) == torch.uint8
            else p.scale
        )

    def loaded(
        self, tensors: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, QuantizationParams]:  # fmt: skip
        """The codes and parameters of tensors from a file, as :meth:`quantize` returned them.

        tensors: the parts by name, or their tiles; shape: of the weight, or of the tile.
        """
        parts = {p.name.removeprefix(name): tensors[p.name] for p in self.parts(name, shape, dtype)}
        f = self.format
        codes = parts.get("_packed", parts.get(""))
        assert codes is not None
        if self.layout == "pack-quantized":
            codes = _unpacked(codes, f.bits, shape[1])
        scale = parts["_scale_inv" if self.layout == "deepseek" else "_scale"]
        scale = scale.view(E8M0) if self.scale == "e8m0" else scale
        zero = parts.get("_zero_point")
        if zero is not None and self.layout == "pack-quantized":
            zero = _unpacked(zero.t().contiguous(), f.bits, self._counts(shape)[1][0])
            zero = (_numbers(zero)[:, : len(scale)] if f.bits == 4 else zero).t()
            zero = zero.clone(memory_format=torch.contiguous_format)
        if self.block is None:
            scale, zero = scale.reshape(()), None if zero is None else zero.reshape(())
        g = parts.get("_global_scale")
        if g is not None:
            g = (g if self.layout == "quantkit" else 1 / g).reshape(())
        return codes, self._params(scale, zero, g)

    def _params(
        self, scale: torch.Tensor, zero: torch.Tensor | None, g: torch.Tensor | None = None
    ) -> QuantizationParams:
        f = self.format
        if zero is None:
            zero = torch.zeros(scale.shape if f.has_zero_point else ())
        return QuantizationParams(
            scale, zero.to(torch.float32), f.low, f.high, dtype=f.dtype, block_size=self.block,
            global_scale=g, compute_dtype=torch.float32,
        )  # fmt: skip

    # ---- numbers --------------------------------------------------------------------------------------

    def quantize(
        self, x: torch.Tensor, extremes: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, QuantizationParams]:
        """The codes and parameters of whole rows.

        The scale that is returned, and stored, is the one that made the codes: it is rounded to its
        dtype first.

        Args:
            x: rows of the weight, float32, bfloat16 or float16.
            extremes: the minimum and the maximum of the whole weight, 0-dim and in x's dtype, where
                ``whole`` is True; else not read.
        """
        options: dict[str, Any] = {"dtype": self.dtype, "compute_dtype": torch.float32}
        ends = None
        if self.whole:
            if extremes is None:
                raise _wrong("extremes", "the minimum and the maximum of the weight", None)
            ends = torch.stack([t.reshape(()) for t in extremes])
        if self.scale in ("e8m0", "e4m3"):
            if self.scale == "e4m3":
                assert ends is not None
                options["global_scale"] = _global_scale(ends)
            q, p = dynamic_quantize(
                x, block_size=self.block, scale_dtype=self._scale_dtype(x.dtype),
                scale_rule=self.scale_rule, **options,
            )  # fmt: skip
        else:
            q, p = self._affine(x, ends, options)
        return q, self._params(
            p.scale, p.zero_point if not self.symmetric else None, p.global_scale
        )

    def _affine(
        self, x: torch.Tensor, ends: torch.Tensor | None, options: dict[str, Any]
    ) -> tuple[torch.Tensor, QuantizationParams]:
        scale_dtype = self._scale_dtype(x.dtype)
        if scale_dtype == torch.float16:
            options["eps"] = 2.0**-24  # the smallest number that is not 0 there
        if self.symmetric:
            options["scale_rule"] = self.scale_rule
        else:
            options["include_zero"] = True
        if ends is None and scale_dtype == torch.float32:  # in one pass
            return dynamic_quantize(x, block_size=self.block, sym=self.symmetric, **options)
        choose = get_symmetric_qparams if self.symmetric else get_asymmetric_qparams
        source, block = (x, self.block) if ends is None else (ends, None)
        p = choose(source, block_size=block, **options)
        p = replace(p, scale=p.scale.to(scale_dtype), block_size=self.block)
        return quantize_tensor(x, p), p

    # ---- as JSON --------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """What ``WeightScheme(**d)`` takes back, of JSON's types."""
        return {**asdict(self), "block": None if self.block is None else list(self.block)}


def _wrong(argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{argument}: expected {expected}, got {got!r}")


def _is_block(block: object) -> bool:
    if not isinstance(block, tuple) or len(block) != 2 or set(map(type, block)) != {int}:
        return False
    return 0 < block[0] < 2**63 and (0 < block[1] < 2**63 or block[1] == -1)


def _global_scale(ends: torch.Tensor) -> torch.Tensor:
    """The global scale: a power of two by which e4m3 scales reach the largest number.

    Then q * scale * global_scale is exact in each order of the steps and in bfloat16 too, and so it is by
    1 / global_scale, which is what consumers store. It is 2^-10 for every weight with max |x| in
    (2.625 / 512, 2.625], where scales lose nothing by it: consumers that join layers, such as vLLM,
    take one for all.
    """
    fitting = get_symmetric_qparams(
        ends, dtype="int16", q_min=-_LARGEST, q_max=_LARGEST, scale_rule="ceil",
        compute_dtype=torch.float32,
    ).scale  # fmt: skip
    usual = fitting.new_tensor(2.0**-10)
    return torch.where((fitting <= usual) & (fitting >= usual * 2.0**-8), usual, fitting)


# ---- int32s of pack-quantized: codes plus half their range, the first in the lowest bits --------------


def _packed(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of bytes, each of one or two codes, as int32s: the last one is filled with zeros."""
    u = q.view(torch.uint8) ^ (0x88 if bits == 4 else 0x80)
    u = torch.nn.functional.pad(u, (0, -u.shape[-1] % 4))
    return u.reshape(-1).view(torch.int32).reshape(len(u), -1)


def _unpacked(words: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """The inverse for rows of k codes: int8, or uint8 with two codes a byte."""
    u = words.reshape(-1).view(torch.uint8).reshape(len(words), -1)[:, : -(-k * bits // 8)]
    u = u ^ (0x88 if bits == 4 else 0x80)
    return u if bits == 4 else u.view(torch.int8)


def _pairs(z: torch.Tensor) -> torch.Tensor:
    """int8 rows of 4-bit numbers, two in a byte; where one is left, its neighbour is stored as 0."""
    u = torch.nn.functional.pad(z, (0, z.shape[-1] % 2), value=-8).view(torch.uint8)
    return OF_NAME["int4"].pack(u & 0xF)


def _numbers(pairs: torch.Tensor) -> torch.Tensor:
    """4-bit numbers as int8, from two in a byte."""
    return OF_NAME["int4"].decode(OF_NAME["int4"].unpack(pairs)).to(torch.int8)


_F8, _F4 = "float8_e4m3fn", "float4_e2m1fn"
#: What ``--scheme`` takes.
SCHEMES: dict[str, WeightScheme] = {
    s.name: s
    for s in (
        WeightScheme("w8a8", "int8", "int-quantized", activations=True),
        WeightScheme("w8", "int8", "pack-quantized"),
        WeightScheme("w4", "int4", "pack-quantized", block=(1, 128)),
        WeightScheme("fp8", _F8, "float-quantized", activations=True),
        WeightScheme(
            "mxfp8", _F8, "mxfp8-quantized", block=(1, 32), scale="e8m0", activations=True
        ),
        WeightScheme(
            "mxfp4", _F4, "mxfp4-pack-quantized", block=(1, 32), scale="e8m0", scale_rule="even"
        ),
        WeightScheme("nvfp4", _F4, "nvfp4-pack-quantized", block=(1, 16), scale="e4m3"),
        WeightScheme(
            "fp8_block", _F8, "deepseek", block=(128, 128), scale="float32", activations=True
        ),
    )
}
