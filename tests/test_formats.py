"""Codes of formats against ml_dtypes, float32 steps against exact arithmetic, the contract's edges."""

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from lib import exact
from lib.cases import assert_same, codes, given, values
from lib.formats import (
    BLOCKS,
    CHOOSE,
    DEQUANTIZE,
    DYNAMIC,
    E4,
    E8M0,
    EACH,
    EACH_FLOAT,
    INF,
    NAN,
    ONE,
    QUANTIZE,
    SHAPE,
    bytes_of,
    codes_of,
    every_code,
    fractions,
    nan_of,
    numbers_of,
    quantized,
)

from quantkit import reference
from quantkit.formats import FORMATS

pytestmark = pytest.mark.fallback

# ---- float formats against ml_dtypes ----------------------------------------------------------------


def by_ml_dtypes(x, f):
    """x, as float32, clipped and cast by ml_dtypes; NaN to the format's."""
    clipped = np.clip(x.to(torch.float32).numpy(), f.low, f.high)
    with np.errstate(invalid="ignore"):  # of NaN
        cast = torch.from_numpy(clipped.astype(getattr(ml_dtypes, f.name)).view(np.uint8))
    return torch.where(x.isnan(), torch.tensor(f.nan, dtype=torch.uint8), cast)


def hard(f):
    """Every number, what lies between two neighbours, and the float32 numbers beside these."""
    numbers = torch.from_numpy(
        np.arange(2**f.bits, dtype=np.uint8).view(getattr(ml_dtypes, f.name)).astype(np.float64)
    )
    numbers = numbers[numbers.isfinite()].unique()
    x = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2]).to(torch.float32)
    for _ in range(4):
        x = torch.cat([x, *(torch.nextafter(x, torch.tensor(v)) for v in (INF, -INF))]).unique()
    return torch.cat([x, torch.tensor([0.0, -0.0, INF, -INF, NAN, -NAN, 1e-45, -1e-45, 3e38])])


@EACH_FLOAT
def test_encoding_agrees_with_ml_dtypes(f):
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (400_000,), generator=generator).to(torch.int32)
    normal = torch.randn(200_000, generator=generator) * 10.0 ** torch.randint(
        -6, 6, (200_000,), generator=generator
    )
    for x in (
        patterns.view(torch.float16),
        patterns.view(torch.bfloat16),
        bits.view(torch.float32),
        normal,
        hard(f),
    ):
        assert torch.equal(codes_of(x, f), by_ml_dtypes(x, f))


@EACH_FLOAT
def test_every_code_is_ml_dtypes_number(f):
    every = every_code(f)
    theirs = every.numpy().view(getattr(ml_dtypes, f.name)).astype(np.float32)
    q = f.pack(every).view(f.storage)
    x_hat = DEQUANTIZE(q, ONE, None, f.name)
    assert_same(x_hat, torch.from_numpy(theirs))
    if f.per_byte == 1:
        assert_same(x_hat, q.to(torch.float32))  # torch agrees
    finite = x_hat.isfinite()
    assert torch.equal(codes_of(x_hat[finite], f), every[finite])


@EACH_FLOAT
@pytest.mark.parametrize("scale", [0.0173, 3.0, 2.0**-130, 2.0**100])
def test_the_quotient_is_rounded_before_the_cast(f, scale):
    scale = torch.tensor(scale)
    x = hard(f) * scale
    assert torch.equal(codes_of(x, f, scale), by_ml_dtypes(x / scale, f))


@EACH_FLOAT
def test_limits_of_float_formats(f):
    good = {3: (1, 2, 8, 96, 240), 2: (1, 2, 8, 96, 224), 1: (1, 2, 3, 4)}[f.mantissa]
    for n in (*good, f.high):
        x = torch.tensor([1e6, -1e6, INF, -INF, 0.9, -0.0, NAN])
        made = codes_of(x, f, ONE, None, -n, n)
        numbers = f.decode(made)
        assert numbers[:4].tolist() == [n, -n, n, -n] and abs(numbers[4] - 0.9) < 0.11
        assert made[5:].tolist() == [2 ** (f.bits - 1), f.nan]
    bad = [(-n, n) for n in (0, -1, {3: 17, 2: 9, 1: 5}[f.mantissa], f.high * 2, f.high + 1)]
    for low, high in [*bad, (0, 8), (-8, 4), (-4, 8), (8, -8)]:
        for call in (
            lambda a, b: quantized(ONE, f, low=a, high=b),
            lambda a, b: CHOOSE(ONE, None, a, b, 1.0, True, f.name),
        ):
            with pytest.raises(ValueError, match=rf"q_min, q_max: .*{f.name}.*\[{low}, {high}\]"):
                call(low, high)


# ---- packing ------------------------------------------------------------------------------------------


PACKED = [f for f in FORMATS if f.per_byte > 1]
EACH_PACKED = pytest.mark.parametrize("f", PACKED, ids=lambda f: f.name)
# Numbers of two codes and more, and the byte that they make: ONNX's example first.
BYTES = {"int4": ([1, -2], 0xE1), "uint4": ([1, 14], 0xE1), "float4_e2m1fn": ([0.5, -6], 0xF1)}
BYTES |= {"int2": ([1, -2, 0, -1], 0b11001001), "uint2": ([1, 2, 0, 3], 0b11001001)}


@EACH_PACKED
def test_packed_codes(f):
    assert quantized(torch.tensor(BYTES[f.name][0]).float(), f).tolist() == [BYTES[f.name][1]]
    each = torch.cartesian_prod(*[every_code(f)] * f.per_byte)
    numbers = f.decode(each).reshape(-1)
    if f.has_zero_point:  # two's complement
        integers = [*range(f.high + 1), *range(f.low, 0)]
        assert f.decode(every_code(f)).tolist() == integers
    q = quantized(numbers, f)
    assert q.dtype == torch.uint8 and q.shape == (256,) and q.is_contiguous()
    places = 2 ** (f.bits * torch.arange(f.per_byte))
    assert torch.equal(q, (each * places).sum(1).to(torch.uint8))
    assert_same(DEQUANTIZE(q, ONE, None, f.name), numbers)
    # Neighbours in the last dimension share a byte, however x lies.
    x = numbers.reshape(16, -1)
    for t in (
        x.t().contiguous().t(),
        x.repeat_interleave(2, 0)[::2],
        torch.stack([x, -x], -1)[..., 0],
    ):
        assert_same(quantized(t, f), q.view(16, 16))
    assert_same(
        DEQUANTIZE(q.view(16, 16).t(), ONE, None, f.name),
        DEQUANTIZE(q.view(16, 16).t().contiguous(), ONE, None, f.name),
    )
    assert_same(DEQUANTIZE(q.view(16, 16)[2:5], ONE, None, f.name), x[2:5])
    if not f.has_zero_point:  # what torch's matrix products take
        assert_same(DEQUANTIZE(q.view(f.dtype), ONE, None, f.name), numbers)
    assert f.pack(f.unpack(q)).equal(q)


@EACH_PACKED
def test_last_sizes_that_make_no_whole_bytes(f):
    limits = f.low, f.high
    for shape in ((), (5,), (2, 3), (0, 1), (2, 2 * f.per_byte - 1)):
        x = torch.zeros(shape)
        for call in (
            lambda x=x: quantized(x, f),
            lambda x=x: DYNAMIC(x, None, *limits, 1e-8, True, f.name),
        ):
            with pytest.raises(ValueError, match=r"^x: "):
                call()
        reference.fake_quantize_format_op(x, ONE, None, *limits, f.name)  # has no codes
    scale, _ = CHOOSE(torch.ones(5), None, *limits, 1e-8, True, f.name)
    assert scale == torch.tensor(1.0) / max(f.high, 1)
    with pytest.raises(ValueError, match=r"^q: "):
        DEQUANTIZE(torch.tensor(3, dtype=torch.uint8), ONE, None, f.name)


# ---- float32 steps in exact arithmetic ----------------------------------------------------------------


X_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int16)


def scaled(shape, i):
    """A scale of each dtype by turns, and a global scale: its own, one number, one for each row."""
    scale, zero_point = given(SHAPE, shape, torch.float32, i, integral=i % 4 < 2)
    if i % 4 == 1:
        return scale.to(E8M0), zero_point, None
    rows = (scale[..., :1] + 0.01) if scale.dim() else scale
    whole = (None, None, rows, torch.tensor(0.013, dtype=torch.float64))[i % 4]
    return scale.to(E4) if i % 4 == 2 else scale, zero_point, whole


@EACH
@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
def test_float32_steps_agree_with_exact_arithmetic(f, dtype):
    for i, (blocks, round_first) in enumerate(itertools.product(BLOCKS, (False, True))):
        if round_first and not f.has_zero_point:
            continue
        x = values(SHAPE, torch.float64, i, spread=3.0 if dtype.is_floating_point else 300.0).to(
            dtype
        )
        wide = f.low < -300 or f.high > 300
        low, high = (
            (f.low, f.high)
            if i % 3 or not wide
            else (f.low // 3 if f.has_zero_point else -96, f.high // 3 if f.has_zero_point else 96)
        )
        scale, zero_point, whole = scaled(blocks, i // 2 + i % 2 + X_DTYPES.index(dtype))
        zero_point = zero_point if f.has_zero_point else None
        steps = {"block_size": blocks, "global_scale": whole}
        options = {**steps, "round_first": round_first}
        args = (x, scale, zero_point, low, high, f.name)
        q = QUANTIZE(*args, **options)
        y, mask = reference.fake_quantize_masked_format_op(*args, **options)
        x_hat = DEQUANTIZE(q, scale, zero_point, f.name, **steps)
        codes_ = f.decode(f.unpack(q))
        xs, ss = fractions(x.to(torch.float32)), fractions(scale.to(torch.float32))
        if whole is not None:
            gs = fractions(whole.to(torch.float32).expand(scale.shape))
            ss = np.vectorize(exact.f32, otypes=[object])(ss * gs)
        zs = fractions(zero_point if f.has_zero_point else torch.zeros(scale.shape))
        for index, elements in exact.blocks_of(SHAPE, blocks or [-1] * len(SHAPE)):
            s, z = (p[index] if blocks else p[()] for p in (ss, zs))
            for at in elements:
                limits = (low, high, round_first)
                number = exact.number(f.name, xs[at], s, z, *limits)
                assert Fraction(codes_[at].item()) == number
                assert mask[at].item() == exact.is_inside(f.name, xs[at], s, z, *limits)
                assert Fraction(x_hat[at].item()) == exact.back(number, s, z)
        assert_same(y, x_hat.to(x.dtype if x.is_floating_point() else torch.float32))


@EACH
def test_half_precision_has_the_bits_of_float32(f):
    for dtype in (torch.float16, torch.bfloat16):
        x = values((4, 64), dtype, 5, special=True)
        results = [
            reference.quantize_dequantize_format_op(t, [1, 16], f.low, f.high, 1e-8, True, f.name)
            for t in (x, x.float(), x.double())
        ]
        for other in results[1:]:
            assert_same(other, results[0])


@EACH
def test_output_dtype_is_one_cast(f):
    q = codes(f, (6, 40))
    scale, zero_point = given((6, 40), [1, 8], torch.float32)
    zero_point = zero_point if f.has_zero_point else None
    wide = DEQUANTIZE(q, scale * 1e3, zero_point, f.name)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert_same(
            DEQUANTIZE(q, scale * 1e3, zero_point, f.name, output_dtype=dtype), wide.to(dtype)
        )
    # The scale's dtype decides nothing else.
    for p in (scale.double(), scale.half()):
        assert DEQUANTIZE(q, p, zero_point, f.name).dtype == torch.float32


# ---- edges --------------------------------------------------------------------------------------------


@EACH
def test_nan_and_infinities_with_given_parameters(f):
    x = torch.tensor([NAN, -NAN, INF, -INF, -0.0, 0.0])
    if f.has_zero_point:
        assert numbers_of(x, f, torch.tensor(0.5)).tolist() == [0, 0, f.high, f.low, 0, 0]
        low, high = (2, 6) if f.high > 6 else (1, f.high)
        assert numbers_of(x, f, ONE, None, low, high).tolist() == [0, 0, high, low, low, low]
    else:
        limits = bytes_of(f.encode(torch.tensor([f.high, f.low]).float(), f.low, f.high))
        q = codes_of(x, f, torch.tensor(0.5)).tolist()
        assert q == [f.nan, f.nan, *limits.tolist(), 2 ** (f.bits - 1), 0]
    # Scales of 0, NaN and less: IEEE's division.
    for s, expected in ((0.0, [f.high, f.low, NAN]), (NAN, [NAN] * 3), (-1.0, [f.low, f.high, 0])):
        numbers = numbers_of(torch.tensor([1e6, -1e6, 0.0]), f, torch.tensor(s))
        wanted = [nan_of(f) if math.isnan(v) else v for v in expected]
        assert_same(numbers + 0.0, torch.tensor(wanted, dtype=torch.float32))


@EACH
def test_nan_and_infinities_spoil_their_block(f):
    x = values((3, 8), torch.bfloat16, 3)
    x[0, 1], x[1, 2] = NAN, -INF
    q, x_hat, scale, zero_point = reference.quantize_dequantize_format_op(
        x, [1, -1], f.low, f.high, 1e-8, True, f.name
    )
    assert scale[0].isnan() and scale[1].isinf() and scale[2].isfinite()
    numbers = f.decode(f.unpack(q))
    assert_same(numbers[0], torch.full((8,), nan_of(f)))
    assert_same(numbers[1, 2], torch.tensor(nan_of(f)))
    assert (numbers[1, [0, 1, 3]] == 0).all()
    assert x_hat[:2].isnan().all() and x_hat[2].isfinite().all()
    assert (zero_point == 0).all()


def test_round_first_adds_the_zero_point_after_rounding():
    x, one = torch.tensor([0.5, 1.5, 2.5, -0.5]), torch.tensor(1.0)
    args = (x, ONE, one, -128, 127, "int8")
    assert QUANTIZE(*args).tolist() == [2, 2, 4, 0]
    assert QUANTIZE(*args, round_first=True).tolist() == [1, 3, 3, 1]
    theirs = torch.fake_quantize_per_tensor_affine(x, 1.0, 1, -128, 127)
    assert torch.equal(QUANTIZE(*args, round_first=True) - 1, theirs)
    # A sum that is no integer is rounded once more.
    fraction = (x, ONE, torch.tensor(0.5), -128, 127, "int8")
    assert QUANTIZE(*fraction, round_first=True).tolist() == [0, 2, 2, 0]
    with pytest.raises(ValueError, match="round_first: "):
        QUANTIZE(x, ONE, None, -448, 448, "float8_e4m3fn", round_first=True)


def test_integers_and_doubles_are_rounded_to_float32_first():
    wide = torch.tensor([2**24 + 1, 2**24 + 3, -(2**31), 2**63 - 1])
    for x in (wide, wide.double()):
        assert_same(
            QUANTIZE(x, torch.tensor(2.0**16), None, -32768, 32767, "int16"),
            QUANTIZE(x.float(), torch.tensor(2.0**16), None, -32768, 32767, "int16"),
        )
    scale = torch.tensor(0.1, dtype=torch.float64)
    assert_same(*(DEQUANTIZE(wide, s, wide[:1], "int8") for s in (scale, scale.float())))
