"""The dtypes of numbers and the formats of codes: limits, and the way to codes and back.

A new format is a line of FORMATS: an Integer, or a Float that says its mantissa and smallest exponent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)
REAL_DTYPES = (
    *FLOAT_DTYPES, torch.bool, torch.int8, torch.uint8, torch.int16, torch.uint16,
    torch.int32, torch.uint32, torch.int64, torch.uint64,
)  # fmt: skip


def rounded(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """t in dtype; float64 reaches half precision through float32, on every device."""
    return t.to(torch.float32).to(dtype) if dtype in HALF_DTYPES else t.to(dtype)


def _rounded_by(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """t from 0 on, rounded up to an integer where its fraction is above u, else down."""
    whole = torch.floor(t)
    return whole + (t - whole > u)


@dataclass(frozen=True)
class Format:
    """What a code is.

    Attributes:
        name: as the ``.format`` operators take it.
        dtype: as the functions take it, and as QuantizationParams holds it.
        bits: of a code. Codes of fewer than 8 share a byte.
        low, high: the limits of a code.
        number: torch's own of dtype, which version 1's operators take as well: much cheaper to pass.
            None: version 1 has no such format.
    """

    name: str
    dtype: torch.dtype
    bits: int
    low: int
    high: int
    number: int | None = None

    has_zero_point: ClassVar[bool]

    @property
    def per_byte(self) -> int:
        """How many codes share a byte; 1 for those of a byte and more."""
        return 8 // self.bits if self.bits < 8 else 1

    @property
    def storage(self) -> torch.dtype:
        """Of the tensor of codes."""
        return self.dtype if self.bits >= 8 else torch.uint8

    def holds(self, q_min: int, q_max: int) -> bool:
        """Whether codes may be limited to [q_min, q_max]."""
        raise NotImplementedError

    def encode(
        self, v: torch.Tensor, q_min: int, q_max: int, u: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The codes of v, one in each element of storage.

        u: random numbers in (0, 1); a magnitude whose fraction is above is rounded up, else down.
        """
        raise NotImplementedError

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The numbers that codes stand for, one in each element: exact in float32."""
        raise NotImplementedError

    def is_inside(self, v: torch.Tensor, q_min: int, q_max: int) -> torch.Tensor:
        """Whether v becomes a code without being clipped: False at NaN."""
        raise NotImplementedError

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes that share a byte put together along the last dimension, the first in the lowest bits."""
        if self.per_byte == 1:
            return codes
        packed = codes[..., 0 :: self.per_byte].clone(memory_format=torch.contiguous_format)
        for k in range(1, self.per_byte):
            packed |= codes[..., k :: self.per_byte] << (k * self.bits)
        return packed

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """The inverse of pack()."""
        if self.per_byte == 1:
            return packed
        codes = [(packed >> (k * self.bits)) & (2**self.bits - 1) for k in range(self.per_byte)]
        return torch.stack(codes, dim=-1).flatten(-2)


class Integer(Format):
    """Codes that are integers, in two's complement where they are signed."""

    has_zero_point = True

    def holds(self, q_min: int, q_max: int) -> bool:
        return self.low <= q_min <= q_max <= self.high

    def encode(
        self, v: torch.Tensor, q_min: int, q_max: int, u: torch.Tensor | None = None
    ) -> torch.Tensor:
        if u is None:
            v = torch.clamp(torch.round(v), q_min, q_max)
        else:
            v = torch.clamp(v, q_min, q_max)
            v = torch.copysign(_rounded_by(v.abs(), u), v)
        codes = torch.where(v.isnan(), 0.0, v)
        if self.bits >= 8:
            return codes.to(self.dtype)
        return (codes.to(torch.int16) & (2**self.bits - 1)).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        if self.bits < 8 and self.low < 0:
            sign = 2 ** (self.bits - 1)
            codes = (codes.to(torch.int16) ^ sign) - sign
        return codes.to(torch.float32)

    def is_inside(self, v: torch.Tensor, q_min: int, q_max: int) -> torch.Tensor:
        v = torch.round(v)
        return (v >= q_min) & (v <= q_max)


@dataclass(frozen=True)
class Float(Format):
    """Codes that are numbers: a sign bit, an exponent, a mantissa.

    Attributes:
        mantissa: its bits.
        least: the exponent of the smallest normal number.
        nan: the code of NaN, or what stands for it.
        beyond: the least magnitude of a code that would be no finite number.
        has_infinity: whether that one is an infinity, and not a NaN.
    """

    mantissa: int = 0
    least: int = 0
    nan: int = 0
    beyond: int = 0
    has_infinity: bool = False

    has_zero_point = False

    def holds(self, q_min: int, q_max: int) -> bool:
        if q_min != -q_max or not 0 < q_max <= self.high:
            return False
        return q_max // (q_max & -q_max) < 2 ** (self.mantissa + 1)  # so few bits are significant

    def encode(
        self, v: torch.Tensor, q_min: int, q_max: int, u: torch.Tensor | None = None
    ) -> torch.Tensor:
        v = torch.clamp(v, q_min, q_max)
        # The exponent field of |v| is also right for NaN, 0 and denormals, once it is raised to least.
        exponent = ((v.abs().view(torch.int32) >> 23) - 127).clamp(min=self.least)
        step = ((exponent - self.mantissa + 127) << 23).view(
            torch.float32
        )  # between v's neighbours
        t = v.abs() / step  # a division by a power of two: exact
        n = torch.round(t) if u is None else _rounded_by(t, u)
        code = n.nan_to_num().to(torch.int32) + ((exponent - self.least) << self.mantissa)
        code = code | (v.signbit().to(torch.int32) << (self.bits - 1))
        return torch.where(v.isnan(), self.nan, code).to(torch.uint8).view(self.storage)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        code = codes.view(torch.uint8).to(torch.int32)
        sign = 2 ** (self.bits - 1)
        magnitude = code & (sign - 1)
        binade = ((magnitude >> self.mantissa) - 1).clamp(min=0)
        steps = (magnitude - (binade << self.mantissa)).to(torch.float32)
        step = ((binade + self.least - self.mantissa + 127) << 23).view(torch.float32)
        value = torch.where(magnitude < self.beyond, steps * step, torch.nan)
        if self.has_infinity:
            value = torch.where(magnitude == self.beyond, torch.inf, value)
        return torch.where(code >= sign, -value, value)

    def is_inside(self, v: torch.Tensor, q_min: int, q_max: int) -> torch.Tensor:
        return (v >= q_min) & (v <= q_max)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)  # torch's type stubs leave some out


# Those of version 1 first, of narrower limits before wider ones: parameters without a dtype take the
# first that holds their limits.
FORMATS = (
    Integer("int8", torch.int8, 8, -128, 127, 1),
    Integer("uint8", torch.uint8, 8, 0, 255, 0),
    Integer("int16", torch.int16, 16, -32768, 32767, 2),
    Integer("uint16", torch.uint16, 16, 0, 65535),
    Integer("int4", _dtype("int4"), 4, -8, 7),
    Integer("uint4", _dtype("uint4"), 4, 0, 15),
    Integer("int2", _dtype("int2"), 2, -2, 1),
    Integer("uint2", _dtype("uint2"), 2, 0, 3),
    Float("float8_e4m3fn", torch.float8_e4m3fn, 8, -448, 448,
          mantissa=3, least=-6, nan=0x7F, beyond=0x7F),
    Float("float8_e5m2", torch.float8_e5m2, 8, -57344, 57344,
          mantissa=2, least=-14, nan=0x7F, beyond=0x7C, has_infinity=True),
    Float("float4_e2m1fn", _dtype("float4_e2m1fn_x2"), 4, -6, 6,
          mantissa=1, least=0, nan=0, beyond=8),
)  # fmt: skip
VERSION_1 = tuple(f for f in FORMATS if f.number is not None)
WIDEST = VERSION_1[-1]  # its limits hold where an operator of version 1 names no format
OF_NAME = {f.name: f for f in FORMATS}
OF_DTYPE = {f.dtype: f for f in FORMATS}
OF_NUMBER = {f.number: f for f in VERSION_1} | {f.dtype: f for f in VERSION_1}

# ---- scales that are codes ----------------------------------------------------------------------------

E8M0 = torch.float8_e8m0fnu  # powers of two: code c is 2^(c - 127), and 255 is NaN
E4M3 = OF_NAME["float8_e4m3fn"]
CODED_SCALES = (E8M0, E4M3.dtype)


def power_of_two(c: torch.Tensor) -> torch.Tensor:
    """The float32 numbers of int32 exponent codes."""
    bits = torch.where(c == 0, 1 << 22, c << 23)  # 2^-127 is a subnormal number
    return torch.where(c == 255, torch.nan, bits.view(torch.float32))


def scale_numbers(scale: torch.Tensor) -> torch.Tensor:
    """The float32 numbers of scales of any dtype that scales may have."""
    if scale.dtype == E8M0:
        return power_of_two(scale.view(torch.uint8).to(torch.int32))
    return E4M3.decode(scale) if scale.dtype == E4M3.dtype else scale.to(torch.float32)
