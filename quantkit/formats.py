"""The dtypes of numbers and the formats of codes: limits, and the way to codes and back.

A new integer format is a line of FORMATS. Another kind of format, such as float8, is a class beside
Integer with its own encode and decode. One that packs its codes says how many share an element.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Format:
    """What a code is.

    Attributes:
        name: as operators will take it where no dtype says it.
        dtype: of the codes' tensor.
        number: torch's own of that dtype, which operators take as well: much cheaper to pass.
        low, high: the limits of a code.
        per_element: how many codes share an element of the codes' tensor.
    """

    name: str
    dtype: torch.dtype
    number: int
    low: int
    high: int
    per_element: int = 1

    def encode(self, v: torch.Tensor, q_min: int, q_max: int) -> torch.Tensor:
        """The codes of v, which is x / scale + zero_point."""
        raise NotImplementedError

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The numbers that codes stand for."""
        raise NotImplementedError


class Integer(Format):
    """Codes that are integers, one in each element."""

    def encode(self, v: torch.Tensor, q_min: int, q_max: int) -> torch.Tensor:
        v = torch.clamp(torch.round(v), q_min, q_max)
        return torch.where(v.isnan(), 0.0, v).to(self.dtype)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.to(torch.float32)


# Those of narrower limits first: parameters that name no dtype take the first that holds theirs.
FORMATS = (
    Integer("int8", torch.int8, 1, -128, 127),
    Integer("uint8", torch.uint8, 0, 0, 255),
    Integer("int16", torch.int16, 2, -32768, 32767),
)
OF_DTYPE: dict[torch.dtype | int, Format] = {f.dtype: f for f in FORMATS}
OF_DTYPE |= {f.number: f for f in FORMATS}
WIDEST = FORMATS[-1]  # its limits hold where an operator names no format
