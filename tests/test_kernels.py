"""Every kernel against the reference, to the bit, on every instruction set.

Most tests are tables of calls: lib.backends.on_every_backend makes the results and compares them. The
emulator is slow: daily it runs what `emulated` says.
"""

import itertools
import math

import pytest
import torch
from lib.backends import on_every_backend
from lib.cases import (
    CODES,
    FLOATS,
    LAYOUTS,
    SPECIAL,
    STRIDES,
    assert_same,
    given,
    offset,
    ops,
    parameter_shape,
    values,
)

from quantkit import reference

CHOSEN_EMULATED = (
    (torch.float32, torch.int8),
    (torch.float64, torch.int8),
    (torch.float16, torch.int8),
    (torch.float32, torch.uint8),
)


def given_calls(x, scale, zero_point, q_min, q_max, code):
    """The operators that take parameters, and the gradient, on one input."""
    args = (x, scale, zero_point, q_min, q_max)
    q = yield "quantize", (*args, code)
    yield "dequantize", (q, scale, zero_point)
    yield "fake_quantize", args
    grad = torch.linspace(-2, 2, max(x.numel(), 1), dtype=x.dtype)[: x.numel()].view(x.shape)
    expanded = torch.ones((), dtype=x.dtype).expand(x.shape)
    _, mask = yield "_fake_quantize_masked", args
    for g in (grad, expanded, grad.flip(0) if x.dim() else grad):
        yield "_masked_gradient", (g, mask)
        yield "_fake_quantize_backward", (g, *args)


def chosen_calls(x, blocks, q_min, q_max, symmetric, code, include_zero=False, eps=1e-8):
    """The operators that choose parameters, on one input."""
    args = (x, blocks, q_min, q_max, eps, symmetric)
    yield "choose_qparams", (*args, include_zero)
    yield "dynamic_quantize", (*args, code, include_zero)
    yield "quantize_dequantize", (*args, code, include_zero)


def each_layout(dtype, seed):
    for i, (shape, blocks, name) in enumerate(LAYOUTS):
        yield STRIDES[name](values(shape, dtype, seed + i, special=i % 3 == 0)), blocks


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_every_backend(emulated=lambda dtype, code: code == torch.int8)
def test_every_granularity_and_layout_with_given_parameters(dtype, code):
    low, high = CODES[code]
    for i, (x, blocks) in enumerate(each_layout(dtype, 0)):
        scale, zero_point = given(x.shape, blocks, dtype, i, integral=i % 2 == 0)
        yield from given_calls(x, scale, zero_point, low, high, code)


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_every_backend(emulated=lambda dtype, code: (dtype, code) in CHOSEN_EMULATED)
def test_every_granularity_and_layout_with_chosen_parameters(dtype, code):
    low, high = CODES[code]
    for i, (x, blocks) in enumerate(each_layout(dtype, 50)):
        yield from chosen_calls(x, blocks, low, high, i % 2 == 0, code, include_zero=i % 4 == 1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_every_backend
def test_every_length_at_several_alignments(dtype):
    whole = values((600,), dtype, 1, special=True)
    one, zero = torch.tensor(0.25, dtype=dtype), torch.tensor(3.0, dtype=dtype)
    each_scale = values((600,), dtype, 2).abs() + 0.25
    for n in (*range(1, 140), *range(140, 513, 7), 255, 256, 257, 511, 512):
        x = offset(whole[:n], n % 7)
        yield from given_calls(x, one, zero, -128, 127, torch.int8)
        if n % 3 == 0:
            yield from given_calls(x, offset(each_scale[:n], n % 5), zero, -128, 127, torch.int8)
        yield from chosen_calls(
            offset(whole[13 : 13 + n], n % 5), None, -128, 127, n % 2 == 0, torch.int8
        )
        yield from chosen_calls(
            offset(whole[13 : 13 + n], 1).view(1, n), [-1, 1], 0, 255, False, torch.uint8
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_every_backend(emulated=lambda dtype: dtype == torch.float16)
def test_hard_values(dtype):
    """Ties, special values, scales from denormal to inf, zero points that are no integers."""
    x = torch.tensor([k / 8 for k in range(-1100, 1100)] + list(SPECIAL) * 3, dtype=torch.float64)
    x = x.to(torch.float32).to(dtype)
    scales = (1.0, 0.5, 0.25, 1e-41, 1e-39, 2.0**126, 2.0**-14, -1.0, 0.0, math.inf, math.nan, 0.1)
    zeros = (0.0, 1.0, -1.0, 0.5, 0.3, -128.0, 127.0, 1000.0, -3e4, math.inf, math.nan)
    for s, z in itertools.product(scales, zeros):
        scale, zero_point = (torch.tensor(v).to(dtype) for v in (s, z))
        for low, high in ((-128, 127), (5, 9), (0, 255), (-32768, 32767), (-9, -2)):
            yield from given_calls(x, scale, zero_point, low, high, torch.int16)
        # The same parameters as one value for each element, and for runs of them.
        yield from given_calls(
            x, scale.expand(x.shape), zero_point.repeat(x.numel()), -128, 127, torch.int8
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@on_every_backend(emulated=lambda dtype: dtype == torch.float16)
def test_every_half_precision_pattern(dtype):
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    for i, (s, z) in enumerate(
        [(1, 0), (0.5, 3), (0.0173, -7), (6e-8, 0.25), (3e4, 1), (1e-3, 0.5)]
    ):
        for p_dtype in (dtype, torch.float32):
            scale, zero_point = (torch.tensor(v).to(p_dtype) for v in (s, z))
            yield from given_calls(x, scale, zero_point, -128, 127, torch.int8)
            yield from given_calls(x, scale.repeat(65536), zero_point.view(1), 0, 255, torch.uint8)
        yield from given_calls(
            x, *(torch.tensor([v], dtype=dtype) for v in (s, z)), -30000, 32767, torch.int16
        )
        yield from chosen_calls(x[i::997].contiguous(), None, -128, 127, False, torch.int8)
    yield from chosen_calls(x.view(256, 256), [1, 1], -128, 127, False, torch.int8)
    yield from chosen_calls(x.view(256, 256), [1, 1], -32768, 32767, True, torch.int16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@on_every_backend(emulated=lambda dtype: dtype == torch.float16)
def test_zero_points_at_the_end_of_half_precision(dtype):
    """Quotients that float16 rounds to an infinity, beside zero points that are as large."""
    x = torch.arange(-32768, 32768, 13, dtype=torch.int32).to(torch.int16).view(dtype)
    for z in (-70000, 70000, -65504, 65520, -2049, 1025, -1024):
        for s in (0.01, 1.0, 300.0):
            for zero_point in (torch.tensor(float(z)), torch.tensor([float(z)]), torch.tensor(z)):
                for scale in (torch.tensor(s), torch.tensor([s]), torch.tensor(s, dtype=dtype)):
                    yield from given_calls(x, scale, zero_point, -128, 127, torch.int8)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fake_quantize_in_place(dtype):
    x = values((3, 5000), dtype, special=True)
    scale, zero_point = torch.tensor(0.05), torch.tensor(3.0)
    expected = reference.fake_quantize_op(x, scale, zero_point, -128, 127)
    for out in (x.clone(), x.t().clone().t()):
        ops.fake_quantize.out(out, scale, zero_point, -128, 127, out=out)
        assert_same(out, torch.empty_like(out).copy_(expected))


@on_every_backend(emulated=True)
def test_every_code_dequantizes():
    for code, (low, high) in CODES.items():
        q = torch.arange(low, high + 1, dtype=torch.int32).to(code)
        for s, z in ((0.0173, 3.0), (1e-41, 0.0), (-0.1, 0.5), (3e38, -7.0)):
            for p in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
                scale, zero_point = (torch.tensor(v).to(p) for v in (s, z))
                yield "dequantize", (q, scale, zero_point)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.int64, torch.bool], ids=str)
@on_every_backend(emulated=lambda dtype: dtype == torch.float16)
def test_every_mix_of_dtypes_and_ranks(dtype):
    """x, scale and zero point of any dtype, each parameter 0-dim or not; ranges inside and outside."""
    shape = (4, 12)
    x = values(shape, torch.float32, 4, special=dtype in FLOATS) * 20
    x = (x.to(dtype) if dtype in FLOATS else x.nan_to_num().clamp(-100, 100).to(dtype)).contiguous()
    kinds = [None, [2, 4], [1, -1], [-1, 1]]
    for s_dtype, z_dtype in itertools.product(
        FLOATS, [*FLOATS, torch.int32, torch.uint8, torch.bool]
    ):
        for s_blocks, z_blocks in itertools.product(kinds, kinds):
            if s_blocks and z_blocks and s_blocks != z_blocks and [2, 4] in (s_blocks, z_blocks):
                continue  # they do not broadcast with each other
            scale, _ = given(shape, s_blocks, s_dtype, 5)
            zero_point = (list(given(shape, z_blocks, torch.float32, 6))[1].abs() * 17).to(z_dtype)
            for low, high in ((-128, 127), (-20000, 20000)):
                args = (x, scale, zero_point, low, high)
                yield "quantize", (*args, torch.int16)
                yield "fake_quantize", args
            for q in (x, x.nan_to_num().clamp(-99, 99).to(torch.int8)):
                yield "dequantize", (q, scale, zero_point)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@on_every_backend(emulated=lambda dtype: dtype == torch.float16)
def test_scales_of_more_bits_than_half_precision(dtype):
    """With a scale of 24 bits x * (1 / scale) may round otherwise than x / scale: here it does."""
    generator = torch.Generator().manual_seed(3)
    x = (torch.rand(40_000, generator=generator) + 1).to(dtype)
    # Between an even code's tie, which it keeps, and the dtype's next number, which is another code's.
    tie = 2 * torch.randint(1, 30, x.shape, generator=generator) + 0.5
    ulp = 2.0 ** (tie.log2().floor()) * torch.finfo(dtype).eps
    scales = x.float() / (tie + ulp / 2)
    codes = ((x.float() / scales).to(dtype)).round(), ((x.float() * (1 / scales)).to(dtype)).round()
    hard = (codes[0] != codes[1]).nonzero().flatten()[:60]
    assert len(hard) > 10
    for i in hard:
        scale, zero = scales[i], torch.zeros((), dtype=dtype)
        args = (x[i].expand(33).contiguous(), scale, zero, -128, 127)
        yield "quantize", (*args, torch.int8)
        yield "fake_quantize", args


# x, scale: x / scale lies beside a tie that x * (1 / scale) with one more fma gives, or the other way.
QUOTIENTS = (
    ("0x1.fb7ffcp-2", "0x1.cffffep-6"),
    ("0x1.f0dffcp-1", "0x1.a7fffep-6"),
    ("0x1.fe77fcp+0", "0x1.e3fffep-6"),
    ("0x1.ca87fep+0", "0x1.23fffep-6"),
    ("0x1.9d33fap+1", "0x1.ebfffap-6"),
    ("0x1p-6", "0x1.fffffep-6"),
)


@on_every_backend
def test_quotients_that_few_products_round_right():
    for x, scale in QUOTIENTS:
        x, scale = (torch.tensor(float.fromhex(v)) for v in (x, scale))
        for z in (0.0, 3.0):
            yield from given_calls(x.repeat(1100), scale, torch.tensor(z), -128, 127, torch.int8)
        largest = scale * 127
        nearby = torch.nextafter(largest, -largest), torch.nextafter(largest, largest * 2)
        for row in (100, 1100, 5000):
            rows = torch.stack([x.repeat(row)] * 3)
            rows[:, 0] = torch.stack([largest, *nearby])
            yield from chosen_calls(rows, [1, -1], -128, 127, True, torch.int8)


@pytest.mark.parametrize("low, high", [(-128, 0), (-1, 127), (0, 127), (5, 9), (-127, 127)])
@on_every_backend
def test_symmetric_limits_that_clip(low, high):
    for row in (100, 1100, 5000):
        yield from chosen_calls(
            values((3, row), torch.float32), [1, -1], low, high, True, torch.int8
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_every_backend(emulated=True)
def test_long_rows_with_parameters_of_their_own(dtype):
    """Each row its zero point, beside one scale for all; and the other way."""
    x = values((3, 1500), dtype, 12)
    many, one = torch.tensor([[0.0], [5.0], [-3.0]], dtype=dtype), torch.tensor(0.25, dtype=dtype)
    yield from given_calls(x, one, many, -128, 127, torch.int8)
    yield from given_calls(x, many.abs() + one, one * 4, -128, 127, torch.int8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_every_backend(emulated=lambda dtype: dtype == torch.float16)
def test_long_rows_of_any_strides(dtype):
    """More elements than a chunk, gathered from one tensor and written to one with other strides."""
    for name, layout in STRIDES.items():
        x = layout(values((3, 2500), dtype, 13))
        for blocks in (None, [1, -1], [-1, 1], [1, 50]):
            yield from given_calls(x, *given(x.shape, blocks, dtype, 14), -128, 127, torch.int8)
            yield from chosen_calls(x, blocks, -128, 127, name < "p", torch.int8)


# A shape, and the dimensions along which x has stride 0.
REPEATED = [
    ((3, 4, 5, 40), (0,)),
    ((3, 4, 5, 40), (1,)),
    ((3, 4, 5, 40), (2,)),
    ((3, 4, 5, 40), (3,)),
    ((3, 4, 5, 40), (0, 2)),
    ((3, 4, 5, 40), (1, 3)),
    ((3, 4, 5, 40), (0, 1, 2, 3)),
    ((2, 3, 1, 1300), (1,)),
    ((1, 1, 3, 1300), (3,)),
    ((300, 1, 3, 4), (2, 3)),
]


def repeated(shape, dims, dtype, transposed, seed=17):
    small = values([1 if d in dims else n for d, n in enumerate(shape)], dtype, seed, spread=9)
    if transposed:
        small = small.transpose(0, -1).contiguous().transpose(0, -1)
    return small.expand(shape)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_every_backend
def test_x_that_repeats_itself(dtype):
    for i, (shape, dims) in enumerate(REPEATED):
        x = repeated(shape, dims, dtype, i % 3 == 1)
        granularities = [None, *([1 if d == c else -1 for d in range(4)] for c in range(4))]
        granularities += [[1, 1, 1, -1], [1, 1, 1, shape[3] // 2], [1, 1, -1, shape[3] // 4]]
        for k, blocks in enumerate(granularities):
            parameters = given(shape, blocks, dtype, 18 + k, integral=k % 2 == 0)
            yield from given_calls(x, *parameters, -128, 127, torch.int8)
            yield from chosen_calls(x, blocks, -128, 127, (i + k) % 2 == 0, torch.int8)


@pytest.mark.parametrize("limits", [(-128, 255), (-129, 255), (-128, 256)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS[2:], ids=str)
@on_every_backend(emulated=lambda dtype, limits: limits[0] == -129)
def test_limits_at_the_end_of_half_precision(dtype, limits):
    x = values((40, 50), dtype, 15) * 20
    scale, zero_point = given(x.shape, [1, -1], dtype, 16)
    yield from given_calls(x, scale, zero_point, *limits, torch.int16)
    yield from chosen_calls(x, [1, -1], *limits, False, torch.int16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_every_backend(emulated=lambda dtype: dtype == torch.float16)
def test_zero_points_that_the_step_cannot_hold(dtype):
    """Rounded first, wherever the value comes from: the emulator has two ways, by turns."""
    x = values((64, 256), torch.float32, 9).to(dtype)
    for shape, p_dtype, turn in itertools.product(((), (256,), (64, 1)), FLOATS, range(4)):
        scale = torch.linspace(0.02, 0.04, max(math.prod(shape), 1)).view(shape).to(dtype)
        zero_point = torch.tensor(0.3 + turn, dtype=torch.float64).to(p_dtype)
        yield from given_calls(x, scale, zero_point, -128, 127, torch.int8)


@on_every_backend(emulated=True)
def test_any_byte_but_zero_is_true():
    x = torch.arange(256, dtype=torch.uint8).view(torch.bool)
    p = torch.tensor(0.01), torch.tensor(0.0)
    yield "quantize", (x, *p, -128, 127, torch.int8)
    yield "dequantize", (x, *p)
    yield "quantize", (values((256,), torch.float32), p[0], x, -128, 127, torch.int8)


@on_every_backend(emulated=True)
def test_scalar_tensors_promote():
    for dtypes in itertools.product(FLOATS, FLOATS, FLOATS):
        x, scale, zero = (
            torch.tensor(v).to(d) for v, d in zip((1.37, 0.0231, 3.3), dtypes, strict=True)
        )
        yield from given_calls(x, scale, zero, -128, 127, torch.int8)
        for blocks in (None, []):
            yield from chosen_calls(x, blocks, -128, 127, False, torch.int8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_every_backend(emulated=lambda dtype: dtype == torch.float32)
def test_lower_rank_parameters_broadcast(dtype):
    x = values((3, 4, 5), dtype, 7)
    for s_shape, z_shape in itertools.product(
        [(5,), (4, 1), (1, 5), (4, 5), (1,)], [(), (1,), (5,)]
    ):
        scale, zero_point = values(s_shape, torch.float32, 8).abs() + 0.01, torch.full(z_shape, 2.0)
        yield from given_calls(x, scale, zero_point, -128, 127, torch.int8)
        yield from given_calls(x, scale.to(dtype), zero_point.to(dtype), -128, 127, torch.int8)


@on_every_backend(emulated=True)
def test_strided_and_expanded_parameters():
    x = values((6, 8), torch.float32, 8)
    wide = values((12, 16), torch.float32, 9).abs() + 0.1
    for scale in (wide[::2, ::2], wide[:6, :1], wide[:1, :8].expand(6, 8), wide[:8, :6].t()):
        for zero_point in (wide[1::2, 1::2].round(), torch.zeros(()), wide[:6, :1].expand(6, 8)):
            yield from given_calls(x, scale, zero_point, -128, 127, torch.int8)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int16, torch.uint8], ids=str)
@on_every_backend(emulated=True)
def test_zero_elements(dtype):
    for shape in ((0,), (3, 0), (0, 4), (2, 0, 3)):
        x = torch.zeros(shape, dtype=dtype)
        for scale in (torch.ones(()), torch.ones([1] * len(shape)), torch.ones(shape)):
            args = (x, scale, torch.zeros(()), -128, 127)
            yield "quantize", (*args, torch.int8)
            yield "dequantize", (x, scale, scale)
            yield "fake_quantize", args


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_every_backend
def test_constants_zeros_and_spread_nan(dtype):
    """All zeros, signed zeros, constants, and a NaN or inf that must spoil its own block only."""
    base = values((8, 24), dtype, 9)
    inputs = [torch.zeros(8, 24), -torch.zeros(8, 24), torch.full((8, 24), 3.5), -torch.ones(8, 24)]
    inputs += [torch.tensor([0.0, -0.0]).repeat(8, 12), torch.tensor([-0.0, 0.0]).repeat(8, 12)]
    for value in (math.nan, math.inf, -math.inf, -math.nan):
        for position in ((0, 0), (3, 11), (7, 23)):
            bad = base.clone()
            bad[position] = value
            inputs.append(bad)
    for x in inputs:
        for blocks in (None, [1, -1], [-1, 1], [2, 6]):
            for symmetric, zero in ((True, False), (False, False), (False, True)):
                for eps in (1e-8, 1e-45, 0.1, math.inf):
                    yield from chosen_calls(
                        x.to(dtype), blocks, -128, 127, symmetric, torch.int8, zero, eps
                    )
                yield from chosen_calls(x.to(dtype), blocks, 3, 3, symmetric, torch.uint8, zero)


LARGE = (1, 300_007), (10, 30_011), (30_011, 10), (300_007, 1), (3, 30_011, 7), (70_001, 3)


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("several_threads")
@on_every_backend(
    emulated=lambda dtype, shape: (dtype == torch.float32 and shape in LARGE[:2]) or None
)
def test_large_tensors_shared_by_threads(shape, dtype):
    """Borders between threads fall inside rows; one channel, ten and a hundred thousand."""
    x = values(shape, dtype, 10)
    x.view(-1)[x.numel() // 2] = 50.0
    rank = len(shape)
    granularities = [None, *([1 if d == c else -1 for d in range(rank)] for c in range(rank))]
    for i, blocks in enumerate(granularities):
        yield from chosen_calls(x, blocks, -128, 127, i % 2 == 0, torch.int8)
        scale, zero_point = given(shape, blocks, dtype, 11)
        yield from given_calls(x, scale, zero_point, -128, 127, torch.int8)
        assert scale.shape == parameter_shape(shape, blocks)
    yield from chosen_calls(x.transpose(0, -1), granularities[1], 0, 255, False, torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 20_011), (6, 20_011), (20_011, 3)], ids=str)
@pytest.mark.usefixtures("several_threads")
@on_every_backend(emulated=lambda dtype, shape: dtype == torch.float32 and shape[0] == 1)
def test_an_extreme_is_found_wherever_it_lies(shape, dtype):
    """At the borders of what threads, blocks and vectors take of a reduction."""
    blocks = [1, -1] if shape[0] < 20_011 else [-1, 1]
    n = math.prod(shape)
    borders = [n * k // 3 // 64 * 64 for k in (1, 2)]  # of three threads
    places = [0, 1, n - 1, *range(n // 2 - 40, n // 2 + 40), *range(0, n, n // 60)]
    places += [at for border in borders for at in range(border - 3, border + 3)]
    for i, place in enumerate(places):
        x = torch.ones(shape, dtype=dtype)
        x.view(-1)[place] = -2 if i % 2 else 3
        yield "choose_qparams", (x, blocks, -128, 127, 1e-3, i % 3 == 0)
