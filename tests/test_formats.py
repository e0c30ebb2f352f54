"""Formats against ml_dtypes and torch, float32 steps against exact arithmetic, the contract's edges."""

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from lib import exact
from lib.cases import assert_same, codes, flat, given, values

from quantkit import reference
from quantkit.formats import FORMATS, OF_NAME

pytestmark = pytest.mark.fallback
INF, NAN = math.inf, math.nan
FLOAT_FORMATS = [f for f in FORMATS if not f.has_zero_point]
INTEGERS = [f for f in FORMATS if f.has_zero_point]
EACH = pytest.mark.parametrize("f", FORMATS, ids=lambda f: f.name)
EACH_FLOAT = pytest.mark.parametrize("f", FLOAT_FORMATS, ids=lambda f: f.name)
QUANTIZE, DEQUANTIZE = reference.quantize_format_op, reference.dequantize_format_op
CHOOSE, DYNAMIC = reference.choose_qparams_format_op, reference.dynamic_quantize_format_op
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


def codes_of(x, f, *args, **options):
    """The codes of a vector as bytes, one in each element of however many share a byte."""
    whole = torch.cat([x, x.new_zeros(-len(x) % f.per_byte)])
    return f.unpack(bytes_of(quantized(whole, f, *args, **options)))[: len(x)]


# ---- float formats against ml_dtypes ----------------------------------------------------------------


def by_ml_dtypes(x, f):
    """x, as float32, clipped and cast by ml_dtypes; NaN to the format's."""
    clipped = np.clip(x.to(torch.float32).numpy(), f.low, f.high)
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


@pytest.mark.parametrize("f", [f for f in FORMATS if f.per_byte > 1], ids=lambda f: f.name)
def test_packed_codes(f):
    numbers = torch.arange(f.low, f.high + 1).float()
    pairs = torch.cartesian_prod(numbers, numbers)
    q = quantized(pairs.reshape(-1), f)
    assert q.dtype == torch.uint8 and q.shape == (256,) and q.is_contiguous()
    low, high = (pairs.to(torch.int64) & 15).unbind(1)  # two's complement
    assert torch.equal(q, (low | high << 4).to(torch.uint8))
    assert torch.equal(DEQUANTIZE(q, ONE, None, f.name), pairs.reshape(-1))
    # Neighbours in the last dimension share a byte, however x lies.
    x = pairs.reshape(16, 32)
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
    assert q.numel() == 256 and f.pack(f.unpack(q)).equal(q)
    # ONNX's example: 1 and -2 (14 of uint4) in one byte.
    assert quantized(torch.tensor([1.0, -2.0 if f.low else 14.0]), f).tolist() == [0xE1]


def test_last_sizes_that_make_no_whole_bytes():
    f = OF_NAME["int4"]
    for shape in ((), (5,), (2, 3), (0, 1)):
        x = torch.zeros(shape)
        for call in (
            lambda x=x: quantized(x, f),
            lambda x=x: DYNAMIC(x, None, -8, 7, 1e-8, True, "int4"),
        ):
            with pytest.raises(ValueError, match=r"^x: "):
                call()
        reference.fake_quantize_format_op(x, ONE, None, -8, 7, "int4")  # has no codes
    assert CHOOSE(torch.ones(5), None, -8, 7, 1e-8, True, "int4")[0] == torch.tensor(1.0) / 7
    with pytest.raises(ValueError, match=r"^q: "):
        DEQUANTIZE(torch.tensor(3, dtype=torch.uint8), ONE, None, "int4")


# ---- float32 steps in exact arithmetic ----------------------------------------------------------------


def fractions(t):
    return np.vectorize(lambda v: Fraction(float(v)), otypes=[object])(t.to(torch.float64).numpy())


def assert_numbers(t, numbers):
    """A float32 tensor has exactly these values; an exact 0 may have either sign."""
    assert t.dtype == torch.float32
    assert [Fraction(v) for v in t.flatten().tolist()] == list(numbers)


SHAPE = (3, 14)
BLOCKS = [None, [1, -1], [-1, 1], [1, 7], [2, 4], [3, 13]]


@EACH
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int16], ids=str
)
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
        scale, zero_point = given(SHAPE, blocks, torch.float32, i, integral=i % 4 < 2)
        zero_point = zero_point if f.has_zero_point else None
        options = {"block_size": blocks, "round_first": round_first}
        args = (x, scale, zero_point, low, high, f.name)
        q = QUANTIZE(*args, **options)
        y, mask = reference.fake_quantize_masked_format_op(*args, **options)
        x_hat = DEQUANTIZE(q, scale, zero_point, f.name, block_size=blocks)
        codes_ = f.decode(f.unpack(q))
        xs, ss = fractions(x.to(torch.float32)), fractions(scale)
        zs = fractions(zero_point if f.has_zero_point else torch.zeros_like(scale))
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
def test_choosing_agrees_with_exact_arithmetic(f):
    schemes = [(True, {})]
    if f.has_zero_point:
        schemes += [(False, {}), (False, {"include_zero": True})]
    if f.low < 0 and f.has_zero_point:
        schemes += [(True, {"scale_rule": "half_range"})]
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    for i, ((symmetric, options), blocks) in enumerate(itertools.product(schemes, BLOCKS)):
        x = values(SHAPE, torch.float64, i + 40) + (9 if i % 3 == 2 else 0)
        x = x.to(torch.float32).to(dtypes[i % 4])
        low, high = (f.low, f.high) if i % 2 or not f.has_zero_point else (max(f.low, -5), 6)
        eps = (1e-8, 0.02)[i % 5 == 4]
        scale, zero_point = CHOOSE(x, blocks, low, high, eps, symmetric, f.name, **options)
        xs = fractions(x.to(torch.float32))
        found = [
            exact.chosen(
                [xs[at] for at in elements], low, high, Fraction(eps), symmetric,
                options.get("include_zero", False), "scale_rule" in options,
            )
            for _, elements in exact.blocks_of(SHAPE, blocks or [-1, -1])
        ]  # fmt: skip
        assert_numbers(scale, [s for s, _ in found])
        if f.has_zero_point:
            assert zero_point.shape == scale.shape
            assert_numbers(zero_point, [z for _, z in found])
        else:
            assert zero_point.shape == () and zero_point == 0 and zero_point.dtype == torch.float32


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
    q = f.unpack(quantized(x, f, torch.tensor(0.5)))
    numbers = f.decode(q)
    if f.has_zero_point:
        assert numbers.tolist() == [0, 0, f.high, f.low, 0, 0]
        assert f.decode(f.unpack(quantized(x, f, ONE, None, 2, 6))).tolist() == [0, 0, 6, 2, 2, 2]
    else:
        assert bytes_of(q).tolist() == [
            f.nan,
            f.nan,
            *bytes_of(f.encode(torch.tensor([f.high, f.low]).float(), f.low, f.high)).tolist(),
            0x80,
            0,
        ]
    # Scales of 0, NaN and less: IEEE's division.
    for s, expected in ((0.0, [f.high, f.low, NAN]), (NAN, [NAN] * 3), (-1.0, [f.low, f.high, 0])):
        numbers = f.decode(
            f.unpack(quantized(torch.tensor([1e6, -1e6, 0.0, 0.0]), f, torch.tensor(s)))
        )[:3]
        wanted = [0.0 if math.isnan(v) and f.has_zero_point else v for v in expected]
        assert_same(
            numbers.abs() if s == -2 else numbers + 0.0, torch.tensor(wanted, dtype=torch.float32)
        )


@EACH
def test_nan_and_infinities_spoil_their_block(f):
    x = values((3, 8), torch.bfloat16, 3)
    x[0, 1], x[1, 2] = NAN, -INF
    q, x_hat, scale, zero_point = reference.quantize_dequantize_format_op(
        x, [1, -1], f.low, f.high, 1e-8, True, f.name
    )
    assert scale[0].isnan() and scale[1].isinf() and scale[2].isfinite()
    numbers = f.decode(f.unpack(q))
    nan = (
        f.decode(torch.tensor([f.nan], dtype=torch.uint8).view(f.storage))[0]
        if not f.has_zero_point
        else torch.tensor(0.0)
    )
    assert_same(numbers[0], nan.expand(8).contiguous())
    assert_same(numbers[1, 2], nan) and (numbers[1, [0, 1, 3]] == 0).all()
    assert x_hat[:2].isnan().all() and x_hat[2].isfinite().all()
    assert (zero_point == 0).all()


def test_block_of_zeros():
    for f in FORMATS:
        for eps in (1e-8, 2.0**-126, 0.1):
            x = torch.tensor([[0.0, -0.0] * 4])
            _, x_hat, scale, _ = reference.quantize_dequantize_format_op(
                x, [1, 4], f.low, f.high, eps, True, f.name
            )
            assert_same(scale, torch.full((1, 2), eps, dtype=torch.float64).float())
            assert (x_hat == 0).all()
            assert torch.equal(x_hat.signbit(), x.signbit() if not f.has_zero_point else x < 0)


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
    ],
    ids=str,
)  # fmt: skip
def test_what_quantize_refuses(changes, texts):
    with pytest.raises(ValueError) as caught:
        QUANTIZE(**(GIVEN | changes))
    assert all(text in str(caught.value) for text in texts), caught.value
    QUANTIZE(**GIVEN)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (E4M3 | {"symmetric": False}, ValueError, "symmetric"),
        ({"symmetric": False, "scale_rule": "half_range"}, ValueError, "scale_rule: only the symmetric"),
        ({"format": "uint4", "q_min": 0, "scale_rule": "half_range"}, ValueError, "scale_rule: .*uint4"),
        (E4M3 | {"scale_rule": "half_range"}, ValueError, "scale_rule: .*e4m3fn"),
        ({"scale_rule": "ceil"}, ValueError, "scale_rule: expected None or half_range, got 'ceil'"),
        ({"scale_dtype": torch.float8_e8m0fnu}, TypeError, "scale_dtype: expected None or torch.float32"),
        ({"global_scale": ONE}, TypeError, "global_scale: expected None"),
        ({"symmetric": True, "include_zero": True}, ValueError, "include_zero: "),
        ({"eps": 0.0}, ValueError, "eps: "),
    ],
    ids=str,
)  # fmt: skip
def test_what_choosing_refuses(arguments, kind, text):
    valid = {"x": torch.ones(4, 8), "block_size": [1, 4], "q_min": -8, "q_max": 7, "eps": 1e-8}
    valid |= {"symmetric": True, "format": "int4"}
    with pytest.raises(kind, match=text):
        CHOOSE(**(valid | arguments))
    assert len(flat(CHOOSE(**valid))) == 2


@pytest.mark.parametrize("f", INTEGERS, ids=lambda f: f.name)
def test_what_codes_dequantize_takes(f):
    for q in (torch.ones(4, dtype=torch.int32), torch.ones(4), torch.ones(4, dtype=torch.int8)):
        if f.per_byte == 1:
            assert (DEQUANTIZE(q, ONE, None, f.name) == 1).all()
        else:
            with pytest.raises(TypeError, match=r"q: expected torch\.uint8"):
                DEQUANTIZE(q, ONE, None, f.name)


@EACH_FLOAT
def test_what_float_codes_dequantize_takes(f):
    for dtype in {torch.uint8, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2} - {f.storage}:
        with pytest.raises(TypeError, match=f"q: expected {f.storage}"):
            DEQUANTIZE(torch.zeros(4).to(dtype), ONE, None, f.name)
