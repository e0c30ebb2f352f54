"""Formats against ml_dtypes and torch, float32 steps against exact arithmetic, the contract's edges."""

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from lib import exact
from lib.backends import daily
from lib.cases import assert_same, codes, flat, given, values

from quantkit import reference
from quantkit.formats import FORMATS, OF_NAME
from quantkit.operators import overloads

pytestmark = pytest.mark.fallback
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


def fractions(t):
    return np.vectorize(lambda v: Fraction(float(v)), otypes=[object])(t.to(torch.float64).numpy())


def assert_numbers(t, numbers):
    """A float32 tensor has exactly these values; an exact 0 may have either sign."""
    assert t.dtype == torch.float32
    assert [Fraction(v) for v in t.flatten().tolist()] == list(numbers)


SHAPE = (3, 16)
BLOCKS = [None, [1, -1], [-1, 1], [1, 8], [2, 4], [3, 13]]
E8M0, E4 = torch.float8_e8m0fnu, torch.float8_e4m3fn
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


CODED = [{"scale_dtype": E8M0}, {"scale_dtype": E8M0, "scale_rule": "floor"}, {"scale_dtype": E4}]
CODED += [{"scale_rule": "ceil"}, {"scale_dtype": torch.float32, "scale_rule": "floor"}]
EVEN = [{"scale_dtype": E8M0, "scale_rule": "even"}, {"scale_rule": "even"}]


def symmetric_schemes(f):
    yield from [{}, *CODED]
    yield from [{"scale_rule": "half_range"}] if f.low < 0 and f.has_zero_point else []
    yield from EVEN if not f.has_zero_point else []


def smallest(options):
    return {E8M0: 2.0**-127, E4: 2.0**-6}.get(options.get("scale_dtype"), 1e-8)


@EACH
def test_choosing_agrees_with_exact_arithmetic(f):
    schemes = [(True, options) for options in symmetric_schemes(f)]
    schemes += [(True, {"scale_dtype": d, "global_scale": 0.013}) for d in (None, E4)]
    if f.has_zero_point:
        schemes += [(False, {}), (False, {"include_zero": True})]
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    for i, ((symmetric, options), blocks) in enumerate(itertools.product(schemes, BLOCKS)):
        x = values(SHAPE, torch.float64, i + 40) + (9 if i % 3 == 2 else 0)
        x = x.to(torch.float32).to(dtypes[i % 4])
        narrow = f.has_zero_point and i % 2 == 0
        low, high = (max(f.low, -5), min(f.high, 6)) if narrow else (f.low, f.high)
        eps = (smallest(options), 0.02)[i % 5 == 4]
        whole = options.get("global_scale")
        tensor = {} if whole is None else {"global_scale": torch.tensor(whole)}
        scale, zero_point = CHOOSE(
            x, blocks, low, high, eps, symmetric, f.name, **{**options, **tensor}
        )
        xs = fractions(x.to(torch.float32))
        found = [
            exact.chosen(f.name, [xs[at] for at in elements], low, high, eps, symmetric, **options)
            for _, elements in exact.blocks_of(SHAPE, blocks or [-1, -1])
        ]
        assert scale.dtype == (options.get("scale_dtype") or torch.float32)
        assert_numbers(scale.to(torch.float32), [s for s, _ in found])
        if f.has_zero_point:
            assert zero_point.shape == scale.shape
            assert_numbers(zero_point, [z for _, z in found])
        else:
            assert zero_point.shape == () and zero_point == 0 and zero_point.dtype == torch.float32


# A rule sees a format's limits and mantissa, no more.
OF_RULES = [f for f in FORMATS if not f.has_zero_point or f.name in ("int8", "int4")]


@pytest.mark.parametrize("f", daily(FORMATS, *OF_RULES), ids=lambda f: f.name)
def test_scales_of_hard_numbers_agree_with_exact_arithmetic(f):
    """Each beside powers of two, beside what rounds to one, subnormal or near the end of float32."""
    powers = 2.0 ** torch.tensor([-149, -140, -128, -127, -126, -125, -8, -1, 0, 1, 9, 126, 127.0])
    between = torch.tensor([1.0, 1.125, 1.25, 1.5, 1.625, 1.75, 1.875])
    x = torch.outer(powers.double(), between.double()).flatten().float()
    x = torch.cat([x, *(x.nextafter(torch.tensor(v)) for v in (INF, -INF))])
    x = torch.cat([x[x.isfinite()], torch.finfo(torch.float32).max * ONE[None], ONE[None] * 0])
    exactly = list(map(Fraction, x.tolist()))
    highs = (f.high, 1, 0) if f.has_zero_point else (f.high, 1, 2)
    for i, (options, high) in enumerate(itertools.product(symmetric_schemes(f), highs)):
        low = max(f.low, -max(high, 2)) if f.has_zero_point else -high
        least = smallest(options)
        eps = (least, least, 2.0**-126 * 1.5 if least < 1e-6 else 0.02, 0.75)[i % 4]
        scale, _ = CHOOSE(x, [1], low, high, eps, True, f.name, **options)
        found = [exact.chosen(f.name, [v], low, high, eps, True, **options)[0] for v in exactly]
        assert_numbers(scale.to(torch.float32), found)


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


def test_block_of_zeros():
    zeros = torch.tensor([[0.0, -0.0] * 4])
    for f in FORMATS:
        cases = [({}, eps, eps) for eps in (1e-8, 2.0**-126, 0.1)]
        cases += [(options, smallest(options), smallest(options)) for options in CODED[:3]]
        cases += [({"scale_rule": "ceil"}, 2.0**-126, 2.0**-126), (CODED[0], 0.1, 2.0**-3)]
        cases += [(CODED[1], 0.1, 2.0**-4), (CODED[2], 0.1, 13 / 128)]
        for options, eps, expected in cases:
            x_hat, scale = DYNAMIC_BACK(zeros, [1, 4], f.low, f.high, eps, True, f.name, **options)[
                1:3
            ]
            assert_same(scale.float(), torch.full((1, 2), expected, dtype=torch.float64).float())
            assert (x_hat == 0).all()
            assert torch.equal(
                x_hat.signbit(), zeros.signbit() if not f.has_zero_point else x_hat < 0
            )


@EACH
def test_edges_of_scales_that_are_chosen_coded(f):
    """NaN, infinities, the largest numbers and the smallest: codes of scales, numbers of codes."""
    big = torch.finfo(torch.float32).max
    x = torch.tensor([[1, NAN, 3, INF], [1, -INF, -3, 0], [big, -big, 1, 0], [1e-45, 0, 0, -1e-40]])
    nan, low = [nan_of(f)] * 4, max(f.low, -f.high)
    ends = [0, low, 0, 0]
    for options, scales, infinite in (
        ({"scale_dtype": E8M0}, [255, 254, None, 0], ends),
        ({"scale_dtype": E8M0, "scale_rule": "floor"}, [255, 254, None, 0], ends),
        ({"scale_dtype": E4}, [0x7F, 0x7E, 0x7E, 8], None),
        ({"scale_dtype": E4, "global_scale": torch.tensor(2.0)}, [0x7F, 0x7E, 0x7E, 8], None),
        ({"scale_rule": "ceil"}, [NAN, 2.0**127, None, 2.0**-127], ends),
        ({}, [NAN, INF, None, 2.0**-126], [0, nan_of(f), 0, 0]),
    ):
        eps = smallest(options) if "scale_dtype" in options else 2.0**-126
        eps = 2.0**-127 if "scale_rule" in options else eps
        choice = (x, [1, -1], low, f.high, eps, True, f.name)
        q, x_hat, scale, _ = DYNAMIC_BACK(*choice, **options)
        found = bytes_of(scale) if "scale_dtype" in options else scale
        for i, code in enumerate(scales):
            if code is not None:
                assert_same(found[i, 0], torch.tensor(code, dtype=found.dtype))
        numbers = f.decode(f.unpack(q))
        assert_same(numbers[0] + 0.0, torch.tensor(nan))
        assert x_hat[0].isnan().all()
        if infinite is not None:
            assert_same(numbers[1] + 0.0, torch.tensor(infinite, dtype=torch.float32))
            assert infinite is not ends or x_hat[1, 1] == low * 2.0**127
        else:  # 448, or 896
            at = 448 * options.get("global_scale", ONE)
            assert_same(
                numbers[1:3], numbers_of(x[1:3].flatten(), f, at, None, low, f.high).view(2, 4)
            )
            assert numbers[1, 1] == low and x_hat[1, 1] == low * at


def test_scales_that_are_codes_stand_for_their_numbers():
    """0, subnormal, largest and NaN, in both directions, also times a global scale."""
    for dtype in (E8M0, E4):
        scale = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)[:, None]
        numbers = scale.to(torch.float32)  # torch agrees
        theirs = bytes_of(scale).numpy().view(getattr(ml_dtypes, str(dtype)[6:]))
        assert_same(numbers, torch.from_numpy(theirs.astype(np.float32)))
        x = values((256, 8), torch.float32) * numbers.nan_to_num(1.0)
        for name, whole in itertools.product(
            ("float8_e4m3fn", "float4_e2m1fn", "int4"), (None, 0.3)
        ):
            f, options = OF_NAME[name], {}
            plain = numbers if whole is None else numbers * torch.tensor(whole)
            if whole is not None:
                if dtype == E8M0:
                    continue
                options = {"global_scale": torch.tensor(whole)}
            q = quantized(x, f, scale, **options)
            assert_same(q, quantized(x, f, plain))
            assert_same(
                DEQUANTIZE(q, scale, None, name, **options), DEQUANTIZE(q, plain, None, name)
            )
            made, right = (
                reference.fake_quantize_masked_format_op(x, s, None, f.low, f.high, name, **o)
                for s, o in ((scale, options), (plain, {}))
            )
            assert_same(made, right)


def test_a_global_scale_is_float32_whatever_its_dtype():
    x = values((4, 32), torch.float32, 2)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        for shape in ((), (1, 1), (4, 1), (2, 2), (4, 2)):
            whole = (values(shape, torch.float32, 1).abs() + 0.01).to(dtype)
            f = OF_NAME["float4_e2m1fn"]
            for scale_dtype in (E4, None):
                choice = (x, [1, 16], f.low, f.high, 2.0**-6, True, f.name)
                results = (
                    DYNAMIC_BACK(*choice, global_scale=g, scale_dtype=scale_dtype)
                    for g in (whole, whole.float())
                )
                assert_same(*results)


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


def test_choosing_from_no_elements():
    for f in FORMATS:
        for shape, blocks, expected in (
            ((0, 4), [1, -1], (0, 1)),
            ((4, 0), [-1, 3], (1, 0)),
            ((0, 4), [3, 2], (0, 2)),
        ):
            q, scale, zero_point = DYNAMIC(
                torch.zeros(shape), blocks, f.low, f.high, 1e-8, True, f.name
            )
            assert scale.shape == expected and q.numel() == 0
            assert zero_point.shape == (expected if f.has_zero_point else ())
            assert f.has_zero_point or zero_point == 0
        for shape, blocks in (((0, 4), None), ((0, 4), [-1, 1]), ((4, 0), [1, -1])):
            with pytest.raises(ValueError, match="x: expected at least one element"):
                DYNAMIC(torch.zeros(shape), blocks, f.low, f.high, 1e-8, True, f.name)


GIVEN = {
    "x": torch.ones(4, 10),
    "scale": torch.ones(4, 3),
    "zero_point": None,
    "q_min": -8,
    "q_max": 7,
}
GIVEN |= {"format": "int4", "block_size": [1, 4]}


def say_the_same(operators, arguments, error):
    """The operators, compiled ones too, refuse arguments in the reference's words."""
    for operator in operators:
        with pytest.raises(RuntimeError) as caught:
            overloads(f"{operator}.format")[0](**arguments)
        assert str(caught.value) == str(error)


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"scale": torch.ones(4, 2)}, ("scale:", "(4, 2)", "[1, 4]", "(4, 3)")),
        ({"scale": torch.ones(4, 5)}, ("scale:", "(4, 5)")),
        ({"scale": torch.ones(())}, ("scale:", "()")),
        ({"scale": torch.ones(3)}, ("scale:", "(3,)")),
        ({"block_size": [4]}, ("block_size:", "2 sizes", "[4]")),
        ({"block_size": [1, 0]}, ("block_size:", "at least 1")),
        ({"block_size": [1, -2]}, ("block_size:", "at least 1")),
        ({"block_size": None}, ("scale:", "divide")),  # 3 does not divide 10
        ({"zero_point": torch.ones(4, 2)}, ("zero_point:", "(4, 2)", "(4, 3)")),
        ({"zero_point": torch.ones(3)}, ("zero_point:", "(3,)")),
        ({"zero_point": torch.ones(4, 10)}, ("zero_point:", "(4, 10)")),
        ({"format": "int3"}, ("format:", "float8_e5m2", "int3")),
        ({"q_min": -9}, ("q_min", "[-9, 7]", "[-8, 7]", "int4")),
        (E4M3 | {"zero_point": ONE}, ("zero_point:", "None")),
        ({"scale": torch.ones(4, 3).to(E8M0), "global_scale": ONE}, ("global_scale:", "e8m0fnu")),
        ({"global_scale": torch.ones(4, 2)}, ("global_scale:", "(4, 2)", "(4, 3)")),
        ({"global_scale": torch.ones(3)}, ("global_scale:", "(3,)", "(4, 3)")),
    ],
    ids=str,
)  # fmt: skip
def test_what_quantize_refuses(changes, texts):
    with pytest.raises(ValueError) as caught:
        QUANTIZE(**(GIVEN | changes))
    assert all(text in str(caught.value) for text in texts), caught.value
    say_the_same(("quantize", "fake_quantize"), GIVEN | changes, caught.value)
    QUANTIZE(**GIVEN)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (E4M3 | {"symmetric": False}, ValueError, "symmetric"),
        ({"symmetric": False, "scale_rule": "half_range"}, ValueError, "scale_rule: only the symmetric"),
        ({"format": "uint4", "q_min": 0, "scale_rule": "half_range"}, ValueError, "scale_rule: .*uint4"),
        (E4M3 | {"scale_rule": "half_range"}, ValueError, "scale_rule: .*e4m3fn"),
        ({"scale_rule": "even"}, ValueError, "scale_rule: even is for float formats, got int4"),
        ({"scale_rule": "up"}, ValueError, "scale_rule: expected None, half_range, ceil, floor or even"),
        *(({"scale_rule": rule, "scale_dtype": E4}, ValueError, f"scale_rule: {rule} makes no .*e4m3fn")
          for rule in ("ceil", "floor", "half_range")),
        ({"scale_rule": "half_range", "scale_dtype": E8M0}, ValueError, "scale_rule: .*e8m0fnu"),
        *(({"symmetric": False, "eps": 0.1, key: value}, ValueError, f"{key}: only the symmetric scheme")
          for key, value in (("scale_rule", "ceil"), ("scale_dtype", E8M0), ("scale_dtype", E4),
                             ("global_scale", ONE))),
        *((change | {"global_scale": ONE}, ValueError, "global_scale: scales that are powers of two")
          for change in ({"scale_dtype": E8M0}, {"scale_rule": "ceil"}, {"scale_rule": "floor"})),
        *(({"global_scale": torch.ones(shape)}, ValueError, "global_scale: shape .* scale of shape")
          for shape in ((2,), (3, 1), (4, 8), (1, 4, 2))),
        *(({"global_scale": ONE.to(dtype)}, TypeError, "global_scale: expected a floating dtype")
          for dtype in (torch.int32, E8M0, E4)),
        *(({"scale_dtype": E4, "eps": eps}, ValueError, r"eps: expected a number above 2\*\*-10")
          for eps in (1e-8, 2.0**-10, 2.0**-10 * (1 + 2.0**-30))),
        *(({"scale_dtype": dtype}, TypeError, "scale_dtype: expected None, torch.float32, ")
          for dtype in (torch.float16, torch.float8_e5m2, torch.uint8)),
        ({"symmetric": True, "include_zero": True}, ValueError, "include_zero: "),
        ({"eps": 0.0}, ValueError, "eps: "),
    ],
    ids=str,
)  # fmt: skip
def test_what_choosing_refuses(arguments, kind, text):
    valid = {"x": torch.ones(4, 8), "block_size": [1, 4], "q_min": -8, "q_max": 7, "eps": 1e-8}
    valid |= {"symmetric": True, "format": "int4"}
    with pytest.raises(kind, match=text) as caught:
        CHOOSE(**(valid | arguments))
    choosers = ("choose_qparams", "dynamic_quantize", "quantize_dequantize")
    say_the_same(choosers, valid | arguments, caught.value)
    assert len(flat(CHOOSE(**valid))) == 2
    CHOOSE(**(valid | {"scale_dtype": E4, "eps": 2.0**-10 * (1 + 2.0**-23)}))


@pytest.mark.parametrize("f", INTEGERS, ids=lambda f: f.name)
def test_what_codes_dequantize_takes(f):
    for q in (torch.ones(4, dtype=torch.int32), torch.ones(4), torch.ones(4, dtype=torch.int8)):
        if f.per_byte == 1:
            assert (DEQUANTIZE(q, ONE, None, f.name) == 1).all()
        else:
            with pytest.raises(TypeError, match=r"q: expected torch\.uint8") as caught:
                DEQUANTIZE(q, ONE, None, f.name)
            arguments = {"q": q, "scale": ONE, "zero_point": None, "format": f.name}
            say_the_same(["dequantize"], arguments, caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        *(({"scale": torch.ones(4, 3).to(dtype)}, f"scale: expected .*, got {dtype}")
          for dtype in (torch.float8_e5m2, torch.uint8, torch.int32)),
        *(({"global_scale": ONE.to(dtype)}, f"global_scale: expected .*, got {dtype}")
          for dtype in (E8M0, E4, torch.int8)),
        *(({name: torch.ones(4, 10).to(dtype)}, f"{name}: expected a real dtype .*, got {dtype}")
          for name in ("x", "zero_point") for dtype in (E8M0, E4)),
    ],
    ids=str,
)  # fmt: skip
def test_dtypes_that_quantize_refuses(changes, text):
    with pytest.raises(TypeError, match=text) as caught:
        QUANTIZE(**(GIVEN | changes))
    say_the_same(("quantize", "fake_quantize"), GIVEN | changes, caught.value)


@EACH_FLOAT
def test_what_float_codes_dequantize_takes(f):
    for dtype in {torch.uint8, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2} - {f.storage}:
        with pytest.raises(TypeError, match=f"q: expected {f.storage}"):
            DEQUANTIZE(torch.zeros(4).to(dtype), ONE, None, f.name)
