"""What tests of formats share: the reference's functions in short, codes and numbers of a vector."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from quantkit import reference
from quantkit.formats import FORMATS

INF, NAN = math.inf, math.nan
FLOAT_FORMATS = [f for f in FORMATS if not f.has_zero_point]
INTEGERS = [f for f in FORMATS if f.has_zero_point]
EACH = pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
EACH_FLOAT = pytest.mark.parametrize("f", FLOAT_FORMATS, ids=lambda f: f.name)
QUANTIZE, DEQUANTIZE = reference.quantize_format_op, reference.dequantize_format_op
CHOOSE, DYNAMIC = reference.choose_qparams_format_op, reference.dynamic_quantize_format_op
DYNAMIC_BACK = reference.quantize_dequantize_format_op
ONE = torch.ones(())
E4M3 = {"format": "float8_e4m3fn", "q_min": -448, "q_max": 448}


def bytes_of(q):
    return q.view(torch.uint8)


def every_code(f):
    """One in each element."""
    return torch.arange(2**f.bits, dtype=torch.int32).to(torch.uint8)


def quantized(x, f, scale=ONE, zero_point=None, low=None, high=None, **options):
    low, high = f.low if low is None else low, f.high if high is None else high
    return QUANTIZE(x, scale, zero_point, low, high, f.name, **options)


def unpacked(x, f, *args, **options):
    """The codes of a vector, one in each element of however many share a byte."""
    whole = torch.cat([x, x.new_zeros(-len(x) % f.per_byte)])
    return f.unpack(quantized(whole, f, *args, **options))[: len(x)]


def codes_of(x, f, *args, **options):
    """The same as bytes."""
    return bytes_of(unpacked(x, f, *args, **options))


def numbers_of(x, f, *args, **options):
    return f.decode(unpacked(x, f, *args, **options))


def nan_of(f):
    """The number of NaN's code."""
    return NAN if not f.has_zero_point and f.nan else 0.0


SHAPE = (3, 16)
BLOCKS = [None, [1, -1], [-1, 1], [1, 8], [2, 4], [3, 13]]
E8M0, E4 = torch.float8_e8m0fnu, torch.float8_e4m3fn


def fractions(t):
    return np.vectorize(lambda v: Fraction(float(v)), otypes=[object])(t.to(torch.float64).numpy())


def assert_numbers(t, numbers):
    """A float32 tensor has exactly these values; an exact 0 may have either sign."""
    assert t.dtype == torch.float32
    assert [Fraction(v) for v in t.flatten().tolist()] == list(numbers)
