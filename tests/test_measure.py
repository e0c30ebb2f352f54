"""measure: sums without rounding, the same from any split, on every backend."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from lib.backends import daily, on_every_backend
from lib.cases import (
    FLOATS,
    LAYOUTS,
    SPECIAL,
    STRIDES,
    assert_same,
    given,
    given_arguments,
    invoke,
    ops,
    values,
)
from torch.utils._pytree import tree_leaves

import quantkit
from quantkit import _load, reference, sums
from quantkit.formats import FORMATS, OF_NAME

pytestmark = pytest.mark.fallback
INT8 = (-128, 127, "int8")


def measured(x, scale=1.0, zero_point=None, limits=INT8, **options):
    """The operator's results, per tensor unless `over` says otherwise."""
    return ops.measure(x, torch.tensor(scale), zero_point, *limits, **options)


def exact(x, x_hat):
    """The two sums by Python's own exact summation, whose terms have at most 48 bits."""
    error = (x_hat.float() - x.float()).double()
    kept = error.isfinite()
    return [math.fsum(float(v) ** 2 for v in t[kept]) for t in (x.double(), error)]


# Numbers whose sum of squares is hard to round: far apart, subnormal, next to a tie.
HARD = {
    "far apart": [2.0**126, 2.0**-126, 1.0, -(2.0**-149), 3.0],
    "subnormal": [1e-45, -1e-40, 2e-38, 1e-45, 1.1754942e-38, 1.1754944e-38],
    "tie to even": [1.0, 2.0**-27, 2.0**-27],
    "above a tie": [1.0, 2.0**-27, 2.0**-27, 2.0**-149],
    "tie to odd": [1.0, 2.0**-26, 2.0**-27, 2.0**-27],
    "full significands": [1.9999999] * 7 + [1.9999999 * 2.0**-12] * 5,
    "greatest": [3.4028235e38] * 9,
    "zeros": [0.0, -0.0],
    "one": [-0.7],
}


@pytest.mark.parametrize("name", HARD)
def test_sums_are_those_of_exact_arithmetic(backend, name):
    for turn, repeat in enumerate((1, 3, 1000)):
        x = torch.tensor(HARD[name] * repeat)[torch.randperm(len(HARD[name]) * repeat)]
        scale = (1e-38, 0.3, 3e37)[turn]
        squares, errors, greatest, counts = measured(x, scale)
        x_hat = quantkit.fake_quantize(x, quantkit.QuantizationParams(scale, 0.0, -128, 127))
        assert [squares.item(), errors.item()] == exact(x, x_hat)
        assert greatest.item() == (x_hat - x).abs().max().item()
        assert counts.tolist() == [int((x / scale).round().abs().gt(127.5).sum()), 0]


def test_random_exponents(backend):
    generator = torch.Generator().manual_seed(0)
    for spread in (1, 4, 20, 60):
        x = torch.randn(3000, generator=generator)
        x = torch.ldexp(x, torch.randint(-spread, spread + 1, (3000,), generator=generator))
        squares, errors, *_ = measured(x, 2.0**-60, limits=(-7, 7, "int4"))
        p = quantkit.QuantizationParams(2.0**-60, 0.0, -7, 7, dtype=torch.int4)
        assert [squares.item(), errors.item()] == exact(x, quantkit.fake_quantize(x, p))


def test_exponents_that_are_as_far_apart_as_one_pass_takes(backend):
    """And a little less and more; many equal squares, so that what one of them rounds away adds up."""
    generator = torch.Generator().manual_seed(1)
    significands = [1.0, 1.9999999, 1.0000001, 1.3333334, *(1 + torch.rand(4, generator=generator))]
    for least, gap in itertools.product((-149, -126, -80, 80), (21, 22, 23, 24, 45, 46)):
        for i, significand in enumerate(significands):
            x = torch.tensor([significands[i - 1], float(significand)]).repeat_interleave(1000)
            x = torch.ldexp(x.double(), torch.tensor([gap, 0]).repeat_interleave(1000) + least)
            x = x.float()[torch.randperm(2000, generator=generator) if i % 2 else slice(None)]
            assert measured(x, 1e30)[0].item() == exact(x, x)[0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_to_float64_against_python(dtype):
    """Digits of every pattern near the border of two doubles."""
    digits = []
    for top, length in itertools.product((0, 1, 2, 9, 18), (1, 12, 22, 23, 24, 31, 32)):
        for low in (0, 1, 2**10, 2**20 + 1, 2**31, 2**32 - 1):
            number = [0] * sums.DIGITS
            number[top] = 2**length - 1 if low % 2 else 2 ** (length - 1)
            for k in (1, 2, 3):
                if top >= k:
                    number[top - k] = low if k < 3 else low & 1
            digits.append(number)
    rounded = sums.rounded(torch.tensor(digits))
    for number, value in zip(digits, rounded.tolist(), strict=True):
        whole = sum(d << (32 * k) for k, d in enumerate(number))
        assert value == math.ldexp(float(whole), -sums.PLACES)


def measures(x, scale, zero_point, f, blocks, over, turn):
    limits = f.low // 2 if f.has_zero_point else f.low, f.high
    args = given_arguments(
        x, scale, zero_point, f, limits, turn,
        block_size=blocks, over=over, round_first=f.has_zero_point and turn % 2 == 1,
    )  # fmt: skip
    yield "measure", args
    yield "measure_limbs", args


@pytest.mark.parametrize("name", daily(OF_NAME, "int8", "uint4", "float8_e4m3fn", "float4_e2m1fn"))
@on_every_backend(emulated=lambda name: name in ("int8", "float4_e2m1fn") or None)
def test_every_layout(name):
    """Any strides, granularity of the parameters and granularity of the sums."""
    f = OF_NAME[name]
    for turn, (shape, blocks, layout) in enumerate(LAYOUTS):
        dtype = FLOATS[turn % 4]
        x = STRIDES[layout](values(shape, dtype, turn, special=turn % 3 == 0))
        scale, zero_point = given(shape, blocks, torch.float32, turn)
        others = [None, [1] * len(shape), [-1] * (len(shape) - 1) + [1], [2] * len(shape), blocks]
        yield from measures(x, scale, zero_point, f, blocks, others[turn % 5], turn)


@on_every_backend(emulated=True)
def test_special_values_and_parameters():
    x = torch.tensor(SPECIAL).repeat(11)
    for f, scale in itertools.product(FORMATS, (0.5, 0.0, -1.0, math.inf, math.nan, 1e-40, 3e38)):
        for zero_point in (0.0, 3.0, math.nan) if f.has_zero_point else (0.0,):
            p = torch.tensor(scale), torch.tensor(zero_point)
            yield from measures(x, *p, f, None, [13], 1)
            yield from measures(x, *p, f, None, [7], 2)


@on_every_backend(emulated=True)
def test_short_blocks_and_no_elements():
    for turn, (shape, blocks, over) in enumerate([
        ((5, 7), [2, 3], [2, 2]), ((5, 7), [1, 4], [5, 4]), ((5, 7), None, [3, -1]),
        ((0, 7), [1, -1], None), ((0, 7), [1, -1], [1, -1]), ((0, 7), [1, -1], [-1, 2]),
        ((), None, None), ((1,), [1], [3]), ((70, 70), [-1, 1], [-1, 1]),
    ]):  # fmt: skip
        x = values(shape, torch.float32, turn)
        scale, zero_point = given(shape, blocks, torch.float32, turn)
        for f in FORMATS:
            yield from measures(x, scale, zero_point, f, blocks, over, 2)


@pytest.mark.parametrize("scheme", ["int8_channel", "mxfp4", "nvfp4", "uint8_token"])
def test_parts_join_to_the_whole(backend, scheme):
    x = values((48, 64), torch.bfloat16, 3, special=True)
    x[x.isnan() | x.isinf()] = 2
    q, p = quantkit.quantize(x, scheme)
    whole = quantkit.measure(x, p)
    assert_same(tuple(whole), tuple(reference.measure(x, p)))
    x_hat = quantkit.dequantize(q, p)
    assert [whole.squares.item(), whole.squared_errors.item()] == exact(x, x_hat)
    ratio = 10 * math.log10(whole.squares / whole.squared_errors)
    assert whole.sqnr_db.item() == pytest.approx(ratio)
    rows = torch.randperm(48).split([1, 20, 27])
    parts = []
    for part in rows:
        own = quantkit.QuantizationParams(
            *(t[part] if t.dim() else t for t in (p.scale, p.zero_point)), p.q_min, p.q_max,
            dtype=p.dtype, block_size=p.block_size, global_scale=p.global_scale,
            compute_dtype=torch.float32,
        )  # fmt: skip
        parts.append(quantkit.measure_limbs(x[part], own))
    limbs, greatest, counts = map(torch.stack, zip(*parts, strict=True))
    joined = quantkit.join_measures(limbs.sum(0), greatest.amax(0), counts.sum(0))
    assert_same(tuple(joined), tuple(whole))
    of_rows = quantkit.measure_limbs(x, p, over=[1, -1])
    joined = quantkit.join_measures(
        of_rows[0].sum((0, 1)), of_rows[1].amax(), of_rows[2].sum((0, 1))
    )
    assert_same(tuple(joined), tuple(whole))


def test_threads_and_chunks_do_not_show(native, threads):
    x = values((301, 1003), torch.float32, 1)
    scale, zero_point = given((301, 1003), [1, -1], torch.float32)
    for over in (None, [1, -1], [-1, 1], [100, 1000]):
        seen = []
        for count in (1, 2, 5):
            threads(count)
            seen.append(invoke(ops.measure, (x, scale, zero_point, *INT8, {"over": over})))
            assert_same(seen[-1], seen[0])


@pytest.mark.skipif(_load.extension is None, reason="slow without kernels")
def test_a_hundred_million_elements(native):
    """The sums of one element repeated are exact multiples, rounded once."""
    n, value = 100_000_000, 1.2345678
    x = torch.tensor(value).expand(n)
    squares, errors, _, counts = measured(x, 0.7)
    v = x[0].double()
    error = (torch.tensor(2.0) * torch.tensor(0.7) - x[0]).double()
    for total, term in ((squares, v), (errors, error)):
        numerator, denominator = (float(term) ** 2).as_integer_ratio()
        assert total.item() == n * numerator / denominator  # true division rounds once
    assert counts.tolist() == [0, 0]


@pytest.mark.parametrize("m", [quantkit, reference], ids=["quantkit", "reference"])
def test_x_of_every_kind_is_measured_as_its_numbers(m):
    """Without a gradient; lazily negated; repeating itself; of integers; with limits and steps."""
    x = values((4, 6), torch.float32, 1)
    for p in (
        quantkit.get_symmetric_qparams(x, True),
        quantkit.QuantizationParams(0.2, 3, -5, 6, round_first=True),
        quantkit.get_symmetric_qparams(x, block_size=[4, 4], compute_dtype=torch.float32),
    ):
        right = tuple(reference.measure(x, p, over=[1, -1]))
        negated, leaf = torch.complex(x, -x).conj().imag, x.clone().requires_grad_()
        assert negated.is_neg()
        for each in (negated, leaf, leaf * 1, x.t().contiguous().t(), x.double()):
            if each.dtype == torch.float64:
                p = replace(p, compute_dtype=torch.float32)
            found = m.measure(each, p, over=(1, -1))
            assert_same(tuple(found), right)
            assert not any(t.requires_grad for t in (*found, *m.measure_limbs(each, p)))
        rows = x[:1].expand(4, 6)
        assert_same(tuple(m.measure(rows, p)), tuple(reference.measure(rows.clone(), p)))
        whole = (x * 9).to(torch.int8)
        assert_same(tuple(m.measure(whole, p)), tuple(reference.measure(whole.float(), p)))
    far = m.measure(x.to("meta"), p.to("meta"), over=[1, 4])
    for t, right in zip(far, reference.measure(x, p, over=[1, 4]), strict=True):
        assert t.is_meta and (t.shape, t.dtype) == (right.shape, right.dtype)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func():
    p = quantkit.QuantizationParams(0.3, 0.0, -8, 7)
    x = values((3, 4, 6), torch.float32, 2)
    found = torch.vmap(lambda each: quantkit.measure(each, p, over=[1, -1]))(x)
    for i, each in enumerate(x):
        assert_same(tuple(t[i] for t in found), tuple(quantkit.measure(each, p, over=[1, -1])))

    def loss(x):
        return (x * quantkit.measure(x, p).squared_errors.float()).sum()

    factor = quantkit.measure(x, p).squared_errors.float()
    expected = torch.full_like(x, factor.item())
    assert_same(torch.func.grad(loss)(x), expected)
    assert_same(torch.func.jacrev(loss)(x), expected)
    assert_same(torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1], (expected * 1).sum())
    assert_same(torch.vmap(torch.func.grad(loss))(x[:, None])[1, 0], torch.func.grad(loss)(x[1]))


class Errors(torch.nn.Module):
    """Of version 1's parameters, and of others; parts too."""

    def forward(self, x):
        p = quantkit.get_asymmetric_qparams(x, True)
        codes = quantkit.QuantizationParams(p.scale, 0.0, -448, 448, dtype=torch.float8_e4m3fn)
        parts = quantkit.measure_limbs(x, codes, over=[1, -1])
        whole = quantkit.measure(x, codes, over=[-1, 1])
        return quantkit.measure(x, p), whole, whole.sqnr_db, quantkit.join_measures(*parts)


@pytest.mark.filterwarnings("ignore")
def test_compiled_exported_and_saved(tmp_path):
    free = {0: torch.export.Dim("rows", min=2), 1: torch.export.Dim.DYNAMIC}
    example = values((5, 6), torch.float32, 1)
    program = torch.export.export(Errors(), (example,), dynamic_shapes=(free,))
    torch.export.save(program, tmp_path / "program.pt2")
    compiled = torch.compile(Errors(), fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((5, 6), (8, 3), (70, 90)):
        x = values(shape, torch.float32, shape[0])
        expected = Errors()(x)
        for function in (
            compiled,
            program.module(),
            torch.export.load(tmp_path / "program.pt2").module(),
        ):
            results = function(x)
            assert [type(r) for r in results] == [type(r) for r in expected]
            assert_same(tuple(tree_leaves(results)), tuple(tree_leaves(expected)))


def test_codes_of_other_steps_are_refused():
    """Where quantize_tensor takes version 1's steps in another dtype than float32."""
    x = torch.randn(4, 6)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        p = quantkit.get_symmetric_qparams(x.to(dtype), True)
        for function in (quantkit.measure, quantkit.measure_limbs, reference.measure):
            with pytest.raises(ValueError, match=r"x: .* pass compute_dtype=torch.float32"):
                function(x.to(dtype), p)
        p = quantkit.get_symmetric_qparams(x.to(dtype), True, compute_dtype=torch.float32)
        assert_same(
            tuple(quantkit.measure(x.to(dtype), p)), tuple(reference.measure(x.to(dtype), p))
        )
    rows, one = torch.rand(4, 1).double(), torch.tensor(0.3).double()
    for scale, zero_point in ((rows, rows.float()), (rows.float(), rows), (one, rows.int())):
        wide = quantkit.QuantizationParams(scale, zero_point, -128, 127)
        assert quantkit.dequantize_tensor(x.to(torch.int8), wide).dtype == torch.float64
        with pytest.raises(ValueError, match=r"pass compute_dtype=torch\.float32"):
            quantkit.measure(x, wide)
    with pytest.raises(
        ValueError, match=r"pass compute_dtype=torch\.float32"
    ):  # 0-dim beside 0-dim
        quantkit.measure(torch.tensor(2.3), quantkit.QuantizationParams(0.1, 0, -8, 7))
    for scale, zero_point in ((one, one), (one, 3), (0.3, 2), (rows.half(), rows.int())):
        p = quantkit.QuantizationParams(scale, zero_point, -128, 127)
        x_hat = quantkit.dequantize_tensor(quantkit.quantize_tensor(x, p), p)
        assert x_hat.dtype == torch.float32
        assert quantkit.measure(x, p).squared_errors.item() == exact(x, x_hat)[1]
    quantkit.measure(torch.ones(4, 6, dtype=torch.int32), quantkit.get_symmetric_qparams(x))


def test_zero_points_that_half_precision_cannot_hold():
    """Version 1 rounds them for codes of 8 bits; measure takes them as they are, as float32 steps do."""
    x = torch.linspace(-1100, -900, 300).view(3, 100)
    for dtype, zero in ((torch.float16, 2051), (torch.bfloat16, 2051), (torch.float16, 40)):
        scale = torch.full((3, 1), 0.5, dtype=dtype)
        p = quantkit.QuantizationParams(scale, torch.full((3, 1), zero), -128, 127)
        exact = replace(p, compute_dtype=torch.float32)
        assert quantkit.measure(x, p) == quantkit.measure(x, exact) == reference.measure(x, p)
        same = torch.equal(quantkit.quantize_tensor(x, p), quantkit.quantize_tensor(x, exact))
        assert same == (zero == 40)


@pytest.mark.parametrize(
    ("over", "error", "text"),
    [
        ([1], ValueError, r"over: expected 2 sizes, one per dimension of x of shape \(4, 6\), got"),
        ([0, 1], ValueError, "over: expected sizes of at least 1, or -1 for a whole dimension"),
        (3, TypeError, "over: expected a list of ints or None, got 3"),
        ([1.5, 1], TypeError, "over: expected a list of ints or None"),
    ],
)
def test_bad_blocks(over, error, text):
    x = torch.randn(4, 6)
    with pytest.raises(error, match=text):
        quantkit.measure(x, quantkit.get_symmetric_qparams(x), over=over)
    if error is ValueError:
        with pytest.raises(RuntimeError, match=text):
            measured(x, over=over)


def test_measured_are_equal_by_contents():
    x = torch.randn(4, 6)
    p = quantkit.get_symmetric_qparams(x)
    for over in (None, [1, -1]):
        a, b = (quantkit.measure(x, p, over=over) for _ in range(2))
        assert (a == b) is True and (a != b) is False and hash(a) == hash(b)
        assert a in [b] and len({a, b}) == 1
        other = quantkit.measure(2 * x, p, over=over)
        for different in (other, tuple(a), None, a._replace(left_out=a.left_out.int())):
            assert (a == different) is False and (a != different) is True
            assert (different == a) is False and (different != a) is True
        far = quantkit.measure(x.to("meta"), p.to("meta"), over=over)
        assert far == far and far != quantkit.measure(x.to("meta"), p.to("meta"), over=over) != a
    assert quantkit.measure(x, p) != quantkit.measure(x, p, over=[4, 6])


def test_bad_parts():
    limbs, greatest, counts = quantkit.measure_limbs(
        torch.randn(4, 6), quantkit.QuantizationParams(0.1, 0.0, -128, 127), over=[1, -1]
    )
    for parts, error, text in (
        (
            (limbs[..., :5], greatest, counts),
            ValueError,
            r"limbs: expected shape \(\.\.\., 2, 19\)",
        ),
        (
            (limbs.int(), greatest, counts),
            TypeError,
            r"limbs: expected torch\.int64, got torch\.int32",
        ),
        (
            (limbs, greatest[0], counts),
            ValueError,
            r"max_error: expected shape \(4, 1\), got \(1,\)",
        ),
        ((limbs, greatest, counts[..., 0]), ValueError, "counts: expected shape"),
        ((None, greatest, counts), TypeError, r"limbs: expected a torch\.Tensor, got NoneType"),
        ((limbs - 5, greatest, counts), ValueError, r"limbs: expected digits from 0 on.*, got -5$"),
        (
            (limbs + 2**32, greatest, counts),
            ValueError,
            r"limbs: expected .*below 2\^32 the last of each sum, got 4294967296$",
        ),
        (
            (limbs, greatest.to("meta"), counts),
            RuntimeError,
            "max_error: expected device cpu, that of limbs, got meta",
        ),
        (
            (limbs, greatest, counts.to("meta")),
            RuntimeError,
            "counts: expected device cpu, that of limbs, got meta",
        ),
    ):
        with pytest.raises(error, match=text):
            quantkit.join_measures(*parts)
