"""The .format overloads of every backend against the reference, to the bit: every format, every option.

The tables are those of tests/test_kernels.py. Packed formats need an even last size: `even` gives one.
"""

import itertools
import math

import pytest
import torch
from lib.backends import daily, on_every_backend, with_results
from lib.cases import (
    FLOATS,
    LAYOUTS,
    SPECIAL,
    STRIDES,
    assert_same,
    check_results,
    coded,
    codes,
    given,
    offset,
    ops,
    values,
)
from lib.formats import INTEGERS

from quantkit.formats import E4M3, E8M0, FORMATS, OF_NAME
from quantkit.operators import OPERATORS
from quantkit.schemes import default_eps

OUTPUTS = (None, torch.float32, torch.float16, torch.bfloat16)
# Limits narrower than a format's own.
NARROW = {f.name: (-6, 6) if f.low < 0 else (1, 12) for f in FORMATS}
NARROW |= {"int2": (-1, 0), "uint2": (1, 2), "float4_e2m1fn": (-4, 4)}
# How scales are chosen.
SCALES = [{"scale_dtype": E8M0}, {"scale_dtype": E4M3.dtype, "global_scale": torch.tensor(0.02)}]
SCALES += [{"scale_dtype": E8M0, "scale_rule": "floor"}, {"scale_dtype": E4M3.dtype}]
SCALES += [{"scale_rule": "ceil"}, {"global_scale": torch.tensor(3.0, dtype=torch.float64)}]
OF_FLOATS = [*SCALES, {"scale_dtype": E8M0, "scale_rule": "even"}]
# uint2 is as int2 and uint4 are: of the full tier.
EACH_FORMAT = pytest.mark.parametrize("name", daily(OF_NAME, *(OF_NAME.keys() - {"uint2"})))
# Formats of more than 2 bits daily, half of them with each dtype of x; all pairs in the full tier.
PAIRS = [
    pair if is_daily else pytest.param(*pair, marks=pytest.mark.full)
    for i, f in enumerate(FORMATS)
    for j, dtype in enumerate(FLOATS)
    for pair, is_daily in [((f.name, dtype), (i + j) % 2 == 0 and f.bits > 2)]
]
EACH_PAIR = pytest.mark.parametrize(("name", "dtype"), PAIRS, ids=str)
EMULATED = ("int4", torch.float32), ("float8_e4m3fn", torch.bfloat16), ("int8", torch.float16)


def is_emulated(name, dtype):
    return (name, dtype) in EMULATED


def even(shape, f):
    """A shape whose last size is one of whole bytes."""
    return (*shape[:-1], shape[-1] * f.per_byte) if shape and shape[-1] % f.per_byte else shape


def limits(f, narrow=False):
    return NARROW[f.name] if narrow else (f.low, f.high)


def given_calls(f, x, scale, zero_point, blocks=None, narrow=False, turn=0, whole=None):
    """The overloads that take parameters, on one input; the options by turns. whole: a global scale."""
    zero_point = zero_point if f.has_zero_point else None
    round_first = f.has_zero_point and turn % 4 == 1
    sizes = {"block_size": blocks, "global_scale": whole}
    args = (x, scale, zero_point, *limits(f, narrow), f.name, {**sizes, "round_first": round_first})
    output = {**sizes, "output_dtype": OUTPUTS[turn % 4]}
    if f.per_byte == 1 or (x.dim() and x.shape[-1] % f.per_byte == 0):
        q = yield "quantize.format", args
        yield "dequantize.format", (q, scale, zero_point, f.name, output)
    yield "fake_quantize.format", args
    yield "_fake_quantize_masked.format", args


def chosen_calls(f, x, blocks, narrow=False, turn=0, eps=1e-8):
    """The overloads that choose parameters, on one input: every other turn one of SCALES."""
    schemes = [(True, {})]
    if f.has_zero_point:
        schemes += [(False, {}), (False, {"include_zero": True})]
        schemes += [(True, {"scale_rule": "half_range"})] if f.low < 0 else []
    if turn % 2:
        schemes = [(True, options) for options in (SCALES if f.has_zero_point else OF_FLOATS)]
    symmetric, options = schemes[turn // 2 % len(schemes)]
    if "scale_dtype" in options:
        eps = max(eps, default_eps(f, options["scale_dtype"]))
    args = (x, blocks, *limits(f, narrow), eps, symmetric, f.name)
    yield "choose_qparams.format", (*args, options)
    options = {**options, "round_first": f.has_zero_point and turn % 5 == 1}
    yield "dynamic_quantize.format", (*args, options)
    options = {**options, "output_dtype": OUTPUTS[turn % 4]}
    yield "quantize_dequantize.format", (*args, options)


def shortened(shape, blocks, turn):
    """Blocks of which the last may be short, for two layouts of three."""
    if blocks is None or turn % 3 == 0:
        return blocks
    return [b if b == -1 else min(b + turn % 3, n + 1) for n, b in zip(shape, blocks, strict=True)]


def each_layout(f, dtype, seed):
    """x, blocks and a number that chooses options, for every granularity and layout."""
    for i, (shape, blocks, layout) in enumerate(LAYOUTS):
        shape = even(shape, f)
        x = STRIDES[layout](values(shape, dtype, seed + i, special=i % 3 == 0))
        yield x, shortened(shape, blocks, i // 2), i


@EACH_PAIR
@on_every_backend(emulated=is_emulated)
def test_every_granularity_and_layout_with_given_parameters(name, dtype):
    f = OF_NAME[name]
    for x, blocks, i in each_layout(f, dtype, 0):
        p_dtype = FLOATS[i % 4]
        scale, zero_point = given(x.shape, blocks, p_dtype, i, integral=i % 6 != 0)
        scale, whole = coded(scale, i)
        if i % 7 == 0:
            zero_point = None if i % 2 else zero_point.to(torch.int32)
        # Of shapes alone where no block is short.
        told = blocks if i % 2 or i // 2 % 3 else None
        yield from given_calls(f, x, scale, zero_point, told, i % 4 == 3, i, whole)


@EACH_PAIR
@on_every_backend(emulated=is_emulated)
def test_every_granularity_and_layout_with_chosen_parameters(name, dtype):
    f = OF_NAME[name]
    for x, blocks, i in each_layout(f, dtype, 300):
        yield from chosen_calls(f, x, blocks, i % 4 == 2, i)


@pytest.mark.parametrize("name", [f.name for f in INTEGERS if f.low < 0])
@on_every_backend(emulated=True)
def test_codes_of_half_a_range_are_clipped(name):
    """In rows that are long enough for every loop: the greatest quotients round to q_max + 1."""
    for i, dtype in enumerate(FLOATS):
        x = values((6, 200), dtype, i)
        for blocks in (None, [1, -1], [1, 100]):
            for first in (False, True):
                options = {"scale_rule": "half_range", "round_first": first}
                args = (x, blocks, *limits(OF_NAME[name]), 1e-8, True, name, options)
                yield "dynamic_quantize.format", args
                yield "quantize_dequantize.format", args


@pytest.mark.parametrize("name", ["int8", "int4"])
@on_every_backend(emulated=True)
def test_ties_that_are_rounded_before_an_odd_zero_point_is_added(name):
    """In rows and in the whole, by a scale of 1 and a zero point of -1, which are chosen."""
    f = OF_NAME[name]
    row = torch.arange(f.low + 1, f.high + 2)
    row = torch.cat([row[:1], row[1:-1] + 0.5, row[-1:]])
    for dtype in FLOATS:
        for blocks in (None, [1, -1]):
            args = (row.to(dtype).repeat(4, 1), blocks, f.low, f.high, 1e-8, False, name)
            found = []
            for first in (False, True):
                found.append((yield "dynamic_quantize.format", (*args, {"round_first": first})))
                yield "quantize_dequantize.format", (*args, {"round_first": first})
            (q, scale, zero_point), (rounded_first, *_) = found
            assert (scale == 1).all() and (zero_point == -1).all()
            assert not torch.equal(q, rounded_first)


@EACH_FORMAT
@on_every_backend(emulated=True)
def test_codes_of_any_strides_dequantize(name):
    """Slices, transposed codes, expanded ones: of packed formats too, whose pairs are neighbours in q."""
    f = OF_NAME[name]
    for i, (shape, blocks, layout) in enumerate(LAYOUTS):
        q = codes(f, (*shape[:-1], shape[-1] * f.per_byte), i)
        # Views of bytes: torch makes few float8 tensors itself.
        q = STRIDES[layout](q.view(BYTES.get(q.dtype, q.dtype))).view(q.dtype)
        whole = (*q.shape[:-1], q.shape[-1] * f.per_byte)
        blocks = shortened(whole, blocks, i)
        scale, zero_point = given(whole, blocks, FLOATS[i % 4], i)
        scale, global_scale = coded(scale, i)
        options = {"block_size": blocks, "global_scale": global_scale}
        options["output_dtype"] = OUTPUTS[i % 4]
        args = (q, scale, zero_point if f.has_zero_point and i % 3 else None, name, options)
        yield "dequantize.format", args


BYTES = dict.fromkeys((torch.float8_e4m3fn, torch.float8_e5m2, E8M0), torch.uint8)


def byte(code, dtype):
    return torch.tensor(code, dtype=torch.uint8).view(dtype)


# Coded scales, a global scale, a zero point: both ends, subnormal numbers, NaN, signs of e4m3.
HARD_SCALES = [(byte(c, E8M0), None, c / 8) for c in (0, 1, 100, 127, 200, 253, 254, 255)]
HARD_SCALES += [(byte(c, E4M3.dtype), None, c % 9.0) for c in (0, 1, 7, 8, 0x38, 0x7E, 0x7F, 0x83)]
HARD_SCALES += [
    (byte(0x31, E4M3.dtype), torch.tensor(g), 3.0) for g in (1e-40, 0.3, 3e38, -1.0, math.nan)
]


@EACH_FORMAT
@on_every_backend(emulated=True)
def test_every_code_dequantizes(name):
    f = OF_NAME[name]
    n = 1 << (16 if f.bits == 16 else 8)
    q = (
        torch.arange(n, dtype=torch.int32)
        .to(torch.int16 if n > 256 else torch.uint8)
        .view(f.storage)
    )
    zeros = {0.0173: 3.0, 1e-41: 0.5, -0.1: 0.0, 3e38: -7.0, math.inf: 1.0, 0.0: 2.0}
    numbers = [(torch.tensor(s), None, z) for s, z in zeros.items()]
    for (s, whole, z), output in itertools.product(numbers + HARD_SCALES, OUTPUTS):
        zero_point = torch.tensor(z) if f.has_zero_point else None
        options = {"output_dtype": output, "global_scale": whole}
        yield "dequantize.format", (q, s, zero_point, name, options)


@pytest.mark.parametrize("name", [f.name for f in FORMATS if f.bits >= 8 and f.has_zero_point])
@on_every_backend(emulated=True)
def test_codes_of_other_dtypes(name):
    """Accumulators and floats: float32 first."""
    wide = torch.tensor([0, 1, -7, 2**24 + 1, 2**31 - 1, -(2**31)] * 9)
    p = torch.tensor(0.03), torch.tensor(5.0)
    for q in (wide, wide.int(), wide.bool(), wide.double(), wide.half(), wide.to(torch.uint8)):
        yield "dequantize.format", (q, *p, name, {"output_dtype": torch.bfloat16})
        yield "dequantize.format", (q, *p, name, {})


def hard_numbers(f):
    """Every number of a float format, what lies between two, and their neighbours; ties of integers."""
    if f.has_zero_point:
        numbers = torch.tensor([k / 8 for k in range(-300, 300)], dtype=torch.float64)
    else:
        every = torch.arange(2**f.bits, dtype=torch.int32).to(torch.uint8)
        every = f.decode(every).double()
        every = every[every.isfinite()].unique()
        numbers = torch.cat([every, (every[1:] + every[:-1]) / 2]) * 2**-3
    x = numbers.to(torch.float32)
    up, down = (torch.nextafter(x, x.new_tensor(v)) for v in (math.inf, -math.inf))
    return torch.cat([x, up, down, torch.tensor(SPECIAL * 2)])


@EACH_PAIR
@on_every_backend(emulated=is_emulated)
def test_hard_values(name, dtype):
    """Ties and their neighbours, special values, scales from denormal to inf, odd zero points."""
    f = OF_NAME[name]
    x = hard_numbers(f)
    x = x[: x.numel() // 4 * 4].to(dtype)
    scales = (0.125, 1.0, 3.0, 1e-41, 2.0**126, 2.0**-14, -1.0, 0.0, math.inf, math.nan, 0.1)
    zeros = (0.0, -1.0, 0.5, 0.3, 127.0, 1e5, math.inf, math.nan) if f.has_zero_point else (0.0,)
    for i, (s, z) in enumerate(itertools.product(scales, zeros)):
        scale, zero_point = torch.tensor(s), torch.tensor(z)
        yield from given_calls(f, x, scale, zero_point, None, i % 3 == 2, i)
        if i % 4 == 0:
            each = scale.expand(x.shape), zero_point.repeat(x.numel())
            yield from given_calls(f, x, *each, [1], False, i // 4)
    for i, (scale, whole, z) in enumerate(HARD_SCALES):
        yield from given_calls(f, x, scale, torch.tensor(z), None, i % 3 == 2, i, whole)


@EACH_FORMAT
@on_every_backend
def test_scales_of_every_power_of_two(name):
    """Rows and columns of each binade, also subnormal ones: where products are no divisions."""
    f = OF_NAME[name]
    powers = 2.0 ** torch.arange(-152, 128, dtype=torch.float64)
    rows = (values((280, 32), torch.float64, 11) * powers[:, None]).float()
    for i, options in enumerate(SCALES if f.has_zero_point else OF_FLOATS):
        whole, scale_dtype = options.get("global_scale"), options.get("scale_dtype")
        x, blocks = (rows, [1, 16]) if i % 2 else (rows.t().contiguous(), [16, 1])
        for eps in (default_eps(f, scale_dtype, options.get("scale_rule")), 0.0173):
            args = (x, blocks, *limits(f, eps > 0.01), eps, True, name)
            chosen = yield "quantize_dequantize.format", (*args, options)
            yield from given_calls(f, x, chosen[2], None, blocks, eps > 0.01, i, whole)


@EACH_FORMAT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@on_every_backend(emulated=None)
def test_every_half_precision_pattern(name, dtype):
    """The same bits as of x.float()."""
    f = OF_NAME[name]
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    for i, s in enumerate((1.0, 0.0173, 6e-8, 3e4)):
        zero_point = torch.tensor(float(3 * i))
        yield from given_calls(f, x, torch.tensor(s), zero_point, None, False, i)
    yield from chosen_calls(f, x.view(256, 256), [1, 2], turn=1)
    yield from chosen_calls(f, x.view(256, 256), [1, 3], turn=4)


@EACH_FORMAT
@on_every_backend
def test_every_length_at_several_alignments(name):
    f = OF_NAME[name]
    for turn, n in enumerate(
        (*range(1, 40), 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)
    ):
        n *= f.per_byte
        dtype = FLOATS[turn % 4]
        x = offset(values((n,), dtype, turn, special=True), turn % 7)
        one, zero = torch.tensor(0.25), torch.tensor(3.0)
        scale, whole = coded(one, turn)
        yield from given_calls(f, x, scale, zero, None, False, turn, whole)
        yield from chosen_calls(f, x.view(1, n), [1, 5 + turn % 9], turn=turn)
        q = codes(f, (n,), turn).view(torch.uint8 if f.bits <= 8 else f.storage)
        q = offset(q, 1 + turn % 5).view(f.storage)
        zero_point = zero if f.has_zero_point else None
        yield "dequantize.format", (q, one, zero_point, name, {"output_dtype": OUTPUTS[turn % 4]})


@EACH_FORMAT
@on_every_backend(emulated=True)
def test_parameters_of_every_kind(name):
    """Each parameter's dtype and rank, lower rank, strides of its own; x of integer dtypes."""
    f = OF_NAME[name]
    shape = (4, 12)
    kinds = [None, [2, 4], [1, -1], [-1, 1]]
    dtypes = [*FLOATS, torch.int8, torch.uint8, torch.bool, torch.int64]
    zeros = [*FLOATS, torch.int32, torch.int64, torch.uint8, torch.bool]
    for i, (dtype, s_dtype) in enumerate(itertools.product(dtypes, FLOATS)):
        x = values(shape, torch.float32, i, special=dtype in FLOATS) * 9
        x = x.to(dtype) if dtype in FLOATS else x.nan_to_num().clamp(0, 100).to(dtype)
        for k, (s_blocks, z_blocks) in enumerate(itertools.product(kinds, kinds)):
            if s_blocks and z_blocks and s_blocks != z_blocks and [2, 4] in (s_blocks, z_blocks):
                continue  # they do not broadcast with each other
            if (i + k) % 3:
                continue
            scale, _ = given(shape, s_blocks, s_dtype, 5)
            zero_point = (list(given(shape, z_blocks, torch.float32, 6))[1] * 1.7).abs()
            zero_point = zero_point.to(zeros[(i + k) % len(zeros)])
            scale, whole = coded(scale, i + k)
            yield from given_calls(f, x, scale, zero_point, None, k % 2 == 1, i + k, whole)
    x = values((3, 4, 6), torch.float32, 7)
    for s_shape, z_shape in itertools.product([(6,), (4, 1), (1,), (4, 6)], [(), (1,), (6,)]):
        scale, zero_point = values(s_shape, torch.float32, 8).abs() + 0.01, torch.full(z_shape, 2.0)
        yield from given_calls(f, x, scale, zero_point)
    wide = values((12, 16), torch.float32, 9).abs() + 0.1
    whole = wide[:1, 1::2]
    for i, p in enumerate((wide, wide.to(E8M0), wide.to(E4M3.dtype))):
        for scale in (p[::2, ::2], p[:6, :1], p[:1, :8].expand(6, 8), p[:8, :6].t()):
            x = values((6, 8), torch.float32, 8)
            of_scales = whole[:, : scale.shape[1]] if i == 2 else None
            for zero_point in (
                wide[1::2, 1::2].round(),
                torch.zeros(()),
                wide[:6, :1].expand(6, 8),
            ):
                yield from given_calls(f, x, scale, zero_point, None, False, 1 + i, of_scales)
    # Integer zero points that the scale's dtype does not hold, where codes are within the limits.
    for dtype, zero in ((torch.bfloat16, 257), (torch.float16, 2049)):
        x = torch.arange(-48, 48, dtype=torch.float32).view(8, 12) - zero
        yield from given_calls(f, x, torch.ones((), dtype=dtype), torch.tensor(zero))


@EACH_FORMAT
@on_every_backend(emulated=lambda name: name != "int2")
def test_short_blocks_beside_zero_points_of_any_shape(name):
    """Blocks longer than x, last blocks of one element, blocks of odd sizes inside of bytes."""
    f = OF_NAME[name]
    for i, (shape, blocks) in enumerate([
        ((5, 14), [2, 4]), ((5, 14), [4, 13]), ((5, 14), [9, 99]), ((5, 14), [1, 3]), ((5, 14), [3, -1]),
        ((5, 14), [2**40, 2**62]), ((3, 4, 10), [2, 3, 9]), ((3, 4, 10), [-1, 3, 1]), ((14,), [4]),
        ((2, 2, 2, 6), [1, -1, 5, 4]), ((129, 260), [128, 128]), ((3, 1000), [1, 128]),
    ]):  # fmt: skip
        shape = even(shape, f)
        x = values(shape, FLOATS[i % 4], i)
        scale, zero_point = given(shape, blocks, torch.float32, i)
        for k, zero in enumerate((zero_point, zero_point.mean(), zero_point[:1], None)):
            s, whole = coded(scale, i + k)
            yield from given_calls(f, x, s, zero, blocks, False, i + k, whole)
        for turn in range(4):
            yield from chosen_calls(f, x, blocks, turn=turn)
        yield from chosen_calls(f, x.transpose(0, -1).contiguous().transpose(0, -1), blocks, turn=i)


@EACH_FORMAT
@on_every_backend(emulated=True)
def test_a_block_longer_than_its_dimension_is_one_short_block(name):
    f = OF_NAME[name]
    for dtype in FLOATS:
        x = values((3, 100), dtype, 1)
        found = []
        for blocks in ([1, 128], [1, 2**63 - 1], [1, -1]):
            args = (x, blocks, *limits(f), 1e-8, True, name, {"output_dtype": torch.float32})
            found.append((yield "quantize_dequantize.format", args))
            q, _, scale, zero_point = found[-1]
            assert scale.shape == (3, 1) and scale.dtype == torch.float32
            zero_point = zero_point if f.has_zero_point else None
            yield "dequantize.format", (q, scale, zero_point, name, {"block_size": blocks})
            yield from given_calls(f, x, scale, zero_point, blocks)
            assert_same(found[-1], found[0])


@EACH_FORMAT
@on_every_backend(emulated=True)
def test_no_elements(name):
    f = OF_NAME[name]
    for i, shape in enumerate([(0,), (3, 0), (0, 4), (2, 0, 8), (0, 0)]):
        x = torch.zeros(shape, dtype=FLOATS[i % 4])
        for scale in (torch.ones(()), torch.ones([1] * len(shape)), torch.ones(shape)):
            yield from given_calls(f, x, scale, torch.zeros(()), None, False, i)
        yield from given_calls(f, x, torch.ones([1] * len(shape)), None, [-1] * len(shape))
        # Without blocks there is nothing to choose, and results are empty.
        yield from chosen_calls(f, x, [1 if n == 0 else -1 for n in shape], turn=i)
        yield from chosen_calls(f, x, [3] * len(shape), turn=i)


@EACH_FORMAT
@on_every_backend(emulated=True)
def test_numbers_without_dimensions(name):
    f = OF_NAME[name]
    for i, dtype in enumerate(FLOATS):
        x = torch.tensor(1.37).to(dtype)
        yield from given_calls(f, x, torch.tensor(0.0231), torch.tensor(3.3), None, False, i)
        for blocks in (None, []):
            calls = chosen_calls(f, x, blocks, turn=i)
            if f.per_byte == 1:
                yield from calls
            else:
                yield next(calls)  # no codes share a byte


@EACH_PAIR
@on_every_backend(emulated=is_emulated)
def test_constants_zeros_and_spread_nan(name, dtype):
    """All zeros, signed zeros, constants, and a NaN or inf that must spoil its own block only."""
    f = OF_NAME[name]
    inputs = [torch.zeros(8, 24), -torch.zeros(8, 24), torch.full((8, 24), 3.5), -torch.ones(8, 24)]
    inputs += [torch.tensor([0.0, -0.0]).repeat(8, 12), torch.full((8, 24), 1e-42)]
    for k, value in enumerate((math.nan, math.inf, -math.inf, -math.nan)):
        bad = values((8, 24), dtype, 9)
        bad[k, 11] = bad[7, 23] = value
        inputs.append(bad)
    for i, x in enumerate(inputs):
        for k, blocks in enumerate((None, [1, -1], [-1, 1], [2, 6], [3, 7])):
            for turn in (0, 1):
                eps = (1e-8, 1e-45, 0.1, 2.0**-126, math.inf)[(i + 2 * k + turn) % 5]
                turn = i + 3 * k + turn
                yield from chosen_calls(f, x.to(dtype), blocks, i % 2 == 1, turn, eps)


@EACH_FORMAT
@pytest.mark.parametrize(
    "shape", daily([(1, 300_008), (10, 30_012), (30_012, 10)], (10, 30_012)), ids=str
)
@pytest.mark.usefixtures("several_threads")
@on_every_backend(emulated=None)
def test_large_tensors_shared_by_threads(name, shape):
    """Borders between threads fall inside rows and blocks, and on whole bytes."""
    f = OF_NAME[name]
    shape = even(shape, f)
    x = values(shape, torch.bfloat16, 10)
    for i, blocks in enumerate((None, [1, -1], [-1, 1], [1, 128], [128, 128], [7, 33], [32, 1])):
        yield from chosen_calls(f, x, blocks, turn=i)
        scale, zero_point = given(shape, blocks, torch.float32, i)
        scale, whole = coded(scale, i)
        yield from given_calls(f, x, scale, zero_point, blocks, False, i, whole)
    if x.shape[0] % f.per_byte == 0:
        yield from chosen_calls(f, x.t(), [1, 128], turn=1)


@EACH_FORMAT
@pytest.mark.usefixtures("native")
def test_results_in_any_strides(name):
    """`out=` tensors of the overloads; what lies between their elements stays."""
    f = OF_NAME[name]
    x = values((6, 8), torch.bfloat16, 1)
    scale, zero_point = given(x.shape, [1, 3], torch.float32, 2)
    calls = [*with_results(given_calls(f, x, scale, zero_point, [1, 3], turn=2))]
    for turn in (1, 3, 6):
        s, whole = coded(scale, turn)
        calls += with_results(given_calls(f, x, s, zero_point, [1, 3], turn=turn, whole=whole))
        calls += with_results(chosen_calls(f, x, [4, 3], turn=turn))
    for operator, args, right in calls:
        for layout in ("contiguous", "misaligned", "transposed", "strided", "every other row"):
            check_results(operator, args, right, layout)


@EACH_FORMAT
@pytest.mark.usefixtures("backend")
def test_fake_quantize_in_place(name):
    f = OF_NAME[name]
    for dtype in FLOATS:
        x = values((3, 500), dtype, special=True)
        zero_point = torch.tensor(3.0) if f.has_zero_point else None
        args = (torch.tensor(0.05), zero_point, *limits(f), name)
        expected = OPERATORS["fake_quantize.format"].reference(x, *args)
        for out in (x.clone(), x.t().clone().t()):
            getattr(ops, "fake_quantize.format").out(out, *args, out=out)
            assert_same(out, torch.empty_like(out).copy_(expected))
